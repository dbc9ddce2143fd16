"""Policies behind a server that speaks OpenVLA's `/act` protocol. Needs neither torch nor transformers."""

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Array types that an answer may hold.
ACCEPTED_DTYPES = ("f2", "f4", "f8", "i4", "i8")
MAX_ACTION_BYTES = 1 << 16


def encode_array(array: NDArray[Any]) -> dict[str, Any]:
    """An array as `json_numpy` writes it, which is what the protocol uses."""
    array = np.ascontiguousarray(array)
    data = base64.b64encode(array.tobytes()).decode("ascii")
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


def decode_action(answer: Any) -> NDArray[np.float32]:
    """
    The action of an answer: a list of numbers, or an array as `json_numpy` writes it, itself perhaps as text.

    Raises:
        ValueError: Anything else, or numbers that are not finite.
    """
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except ValueError as error:
            raise ValueError(f"the server's answer is no action: {answer[:200]!r}") from error
    if isinstance(answer, dict) and "__numpy__" in answer:
        dtype, data = str(answer.get("dtype")), base64.b64decode(answer["__numpy__"], validate=True)
        if dtype.lstrip("<>=|") not in ACCEPTED_DTYPES or len(data) > MAX_ACTION_BYTES:
            raise ValueError(f"the server answered with an array of {dtype}, {len(data)} bytes.")
        action = np.frombuffer(data, dtype=np.dtype(dtype)).reshape(answer.get("shape", [-1]))
    else:
        action = np.asarray(answer)
    if not np.issubdtype(action.dtype, np.number) or not action.size or not np.isfinite(action).all():
        raise ValueError(f"the server's answer is no action: {str(answer)[:200]}")
    return action.astype(np.float32)


class RemotePolicy:
    """
    A policy on a server that speaks OpenVLA's protocol: `POST /act` with `image`, `instruction` and `unnorm_key`.

    Args:
        url: Of the server, with or without `/act`.
        unnorm_key: Passed along; the server's own choice when None.
        timeout: Seconds to wait for an action.
        num_connections: Requests under way at a time.
    """

    def __init__(
        self, url: str, unnorm_key: str | None = None, timeout: float = 60.0, num_connections: int = 8
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"`url` must begin with http:// or https://, got {url!r}.")
        self.url = url if url.rstrip("/").endswith("/act") else f"{url.rstrip('/')}/act"
        self.unnorm_key, self.timeout, self.num_connections = unnorm_key, timeout, num_connections

    def act(self, images: Sequence[NDArray[np.uint8]], instructions: Sequence[str]) -> NDArray[np.float32]:
        """Actions (batch, action_dim) float32; where the server answers with a chunk of actions, its first.

        Raises:
            ValueError: A server that cannot be reached, an error of the server's, an answer that is no action.
        """
        with ThreadPoolExecutor(self.num_connections) as executor:
            return np.stack(list(executor.map(self._ask, images, instructions)))

    def _ask(self, image: NDArray[np.uint8], instruction: str) -> NDArray[np.float32]:
        payload: dict[str, Any] = {"image": encode_array(image), "instruction": instruction}
        if self.unnorm_key is not None:
            payload["unnorm_key"] = self.unnorm_key
        request = urllib.request.Request(
            self.url, json.dumps(payload).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = json.loads(response.read(MAX_ACTION_BYTES * 2))
        except urllib.error.HTTPError as error:
            raise ValueError(
                f"{self.url} answered {error.code}: {error.read(500).decode(errors='replace')}"
            ) from error
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.url} gave no answer: {error}") from error
        action = decode_action(answer)
        return action if action.ndim == 1 else action.reshape(-1, action.shape[-1])[0]


__all__ = ["RemotePolicy", "decode_action", "encode_array"]
