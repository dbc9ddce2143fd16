"""
The scorer's page and the robot's interface of a real-robot evaluation, on this machine only (127.0.0.1).

The page never says which policy plays. The robot's program learns it with a password that the terminal prints:
`GET /next`, and `POST /finished` with `{"run": NAME}`, both with `Authorization: Bearer TOKEN`.
"""

import hmac
import json
import logging
import secrets
import socketserver
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from lapa.evaluation.robot_session import NotNow, RobotSession
from lapa.evaluation.robot_session_file import read_photo
from lapa.evaluation.robot_session_page import page_state, render_page

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
# A forwarded port keeps its own number, so that only the name of the host is looked at.
HOST_NAMES = ("127.0.0.1", "localhost")
MAX_BODY = 64 << 10
# Seconds a client may keep a connection busy without sending anything.
CLIENT_TIMEOUT = 30


class Refused(Exception):
    """A request that is not carried out.

    Args:
        status: Of the answer.
        message: What is wrong, for the reader.
        on_page: Whether the scorer's page shows it.
    """

    def __init__(self, status: HTTPStatus, message: str, on_page: bool = False) -> None:
        super().__init__(message)
        self.status, self.on_page = status, on_page


class SessionServer(ThreadingHTTPServer):
    """
    Serves a session until `shutdown`.

    Args:
        session: What is scored.
        port: To listen on; a free one when 0.
        write_report: Called when the scorer ends the session; writes the report and returns the path of its page.

    Raises:
        ValueError: A port that is taken.
    """

    daemon_threads = True

    def __init__(self, session: RobotSession, port: int, write_report: Callable[[], Path]) -> None:
        self.session, self.write_report = session, write_report
        # Forms carry it; a page of another site cannot read it.
        self.form_token = secrets.token_urlsafe(24)
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ValueError(f"`port` {port} cannot be used: {error}") from error

    def server_bind(self) -> None:
        """Binds without looking up the name of this machine, which may ask a name server."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that goes away in the middle of an answer is no news for the terminal."""
        logger.debug("a connection ended", exc_info=True)

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://{HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: SessionServer
    protocol_version = "HTTP/1.1"
    timeout = CLIENT_TIMEOUT

    def do_GET(self) -> None:
        """Page, photo, state and report of the scorer; whose turn it is for the robot."""
        self.answer(self.get)

    def do_POST(self) -> None:
        """Buttons of the scorer; the robot's word that it has finished."""
        self.answer(self.post)

    def answer(self, respond: Callable[[], None]) -> None:
        try:
            self.check_origin()
            respond()
        except Refused as error:
            self.complain(error.status, str(error), error.on_page)
        except NotNow as error:
            self.complain(HTTPStatus.CONFLICT, str(error), self.command == "POST")
        except ValueError as error:
            self.complain(HTTPStatus.BAD_REQUEST, str(error), self.command == "POST")
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except OSError as error:
            logger.warning("%s %s: %s", self.command, self.path, error)
            self.complain(HTTPStatus.INTERNAL_SERVER_ERROR, f"This could not be done: {error}", self.command == "POST")

    def get(self) -> None:
        path = urlsplit(self.path).path
        if path == "/":
            self.send_page()
        elif path == "/state":
            self.send_json(page_state(self.server.session))
        elif path == "/next":
            self.check_robot()
            self.send_json(self.server.session.robot_view())
        elif path == "/report":
            self.send_report()
        elif path.startswith("/photo/"):
            self.send_photo(path.removeprefix("/photo/"))
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "There is no such page.")

    def post(self) -> None:
        path, body = urlsplit(self.path).path, self.body()
        if path == "/finished":
            self.check_robot()
            self.finished(body)
            return
        form = {
            key: values[-1] for key, values in parse_qs(body.decode(errors="replace"), True, max_num_fields=20).items()
        }
        if not hmac.compare_digest(form.get("token", "").encode(), self.server.form_token.encode()):
            raise Refused(
                HTTPStatus.FORBIDDEN,
                "This page was opened before the program was started again (or by another site). Nothing was changed: "
                "go on from the page as it is now.",
                on_page=True,
            )
        session, run = self.server.session, form.get("run", "")
        actions: dict[str, Callable[[], None]] = {
            "/start": lambda: session.start(run),
            "/score": lambda: session.score(
                run, _number(form.get("score", "")), form.get("note", "").replace("\r\n", "\n")
            ),
            "/repeat": lambda: session.repeat(run),
            "/undo": session.undo,
            "/pause": session.pause,
            "/resume": session.resume,
            "/end": self.end,
        }
        if path not in actions:
            raise Refused(HTTPStatus.NOT_FOUND, "There is no such action.")
        actions[path]()
        self.send(HTTPStatus.SEE_OTHER, b"", {"Location": "/"})

    def end(self) -> None:
        self.server.session.end()
        self.server.write_report()

    def finished(self, body: bytes) -> None:
        try:
            run = json.loads(body)["run"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Refused(HTTPStatus.BAD_REQUEST, 'send {"run": NAME} as JSON.') from error
        self.server.session.finish(str(run))
        self.send_json(self.server.session.robot_view())

    # What is asked of a request

    def check_origin(self) -> None:
        """Refuses names that a stranger's site could have pointed here, and requests that another site sends."""
        host = self.headers.get("Host", "")
        if urlsplit(f"//{host}").hostname not in HOST_NAMES:
            raise Refused(HTTPStatus.FORBIDDEN, f"this program answers to {' and '.join(HOST_NAMES)} only.")
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "none")
        if (origin is not None and origin != f"http://{host}") or (self.command == "POST" and site == "cross-site"):
            raise Refused(HTTPStatus.FORBIDDEN, "a request of another site was refused.")

    def check_robot(self) -> None:
        """Lets only a program with the robot's password learn which policy plays; never a page in a browser."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        right = hmac.compare_digest(given.encode(errors="replace"), self.server.session.robot_token.encode())
        if not right or self.headers.get("Origin") is not None:
            raise Refused(HTTPStatus.UNAUTHORIZED, "`Authorization: Bearer TOKEN` must hold the robot's token.")

    def body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or int(length) > MAX_BODY:
            self.close_connection = True
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request must be at most {MAX_BODY >> 10} KiB long.")
        return self.rfile.read(int(length))

    # Answers

    def send_page(self, status: HTTPStatus = HTTPStatus.OK, message: str = "") -> None:
        nonce = secrets.token_urlsafe(16)
        page = render_page(self.server.session, self.server.form_token, nonce, message).encode()
        policy = (
            f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; img-src 'self' data:; connect-src 'self'; "
            "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
        )
        headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy}
        self.send(status, page, headers)

    def send_report(self) -> None:
        if not self.server.session.state.ended:
            raise Refused(HTTPStatus.NOT_FOUND, "The report is written when the session is ended.")
        page = self.server.write_report().read_bytes()
        policy = (
            "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
        )
        self.send(HTTPStatus.OK, page, {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy})

    def send_photo(self, number: str) -> None:
        trials = self.server.session.session.trials
        known = number.isascii() and number.isdigit() and 1 <= int(number) <= len(trials)
        photo = trials[int(number) - 1].photo if known else None
        if photo is None:
            raise Refused(HTTPStatus.NOT_FOUND, "There is no such photo.")
        content, media_type = read_photo(Path(photo))
        self.send(HTTPStatus.OK, content, {"Content-Type": media_type})

    def send_json(self, values: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send(status, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def complain(self, status: HTTPStatus, message: str, on_page: bool) -> None:
        # What is left of a refused request must not be read as the next one.
        self.close_connection = True
        if urlsplit(self.path).path in ("/next", "/finished", "/state"):
            self.send_json({"error": message}, status)
        elif on_page:
            self.send_page(status, message)
        else:
            self.send(status, f"{message}\n".encode(), {"Content-Type": "text/plain; charset=utf-8"})

    def send(self, status: HTTPStatus, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        always = {
            "Connection": "close" if self.close_connection else "keep-alive",
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in {**always, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """The terminal stays free for what the scorer needs."""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"`score` must be a number, got {text[:50]!r}.") from error


__all__ = ["HOST", "SessionServer"]
