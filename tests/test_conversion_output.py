"""What `lapa convert` writes is whole and verified, or nothing is left; memory does not follow the file."""

import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flax_files import write_stream
from safetensors.torch import load_file
from tiny_checkpoints import TINY_CONFIG, tiny_arrays, weights

import lapa.conversion.output_folder as output_folder
from lapa.conversion.convert_checkpoints import convert_policy
from lapa.modeling_lapa.modeling_lapa import LapaForLatentAction

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "conversion_memory.py"


@pytest.fixture
def tiny_params(tmp_path):
    return write_stream(tmp_path / "params", tiny_arrays())


def test_shards_and_their_index_load(tmp_path, tiny_params):
    convert_policy(tiny_params, tmp_path / "one", config=TINY_CONFIG)
    convert_policy(tiny_params, tmp_path / "many", config=TINY_CONFIG, max_shard_bytes=1000)
    assert (tmp_path / "one" / "model.safetensors").exists()
    shards = sorted(tmp_path.glob("many/model-*.safetensors"))
    assert len(shards) > 3 and all(load_file(shard) for shard in shards)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = weights(tmp_path / "one"), LapaForLatentAction.from_pretrained(tmp_path / "many").state_dict()
    assert set(index["weight_map"]) == set(one) == set(many)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_existing_output_is_replaced_only_on_request_and_only_if_converted(tmp_path, tiny_params):
    output = tmp_path / "policy"
    output.mkdir()
    convert_policy(tiny_params, output, config=TINY_CONFIG)  # an empty folder is no obstacle
    before = weights(output)
    other = write_stream(tmp_path / "other", tiny_arrays(seed=1))
    with pytest.raises(ValueError, match="--overwrite"):
        convert_policy(other, output, config=TINY_CONFIG)
    assert torch.equal(weights(output)["lm_head.weight"], before["lm_head.weight"])
    convert_policy(other, output, config=TINY_CONFIG, overwrite=True)
    assert not torch.equal(weights(output)["lm_head.weight"], before["lm_head.weight"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no earlier conversion"):
        convert_policy(other, tmp_path / "mine", config=TINY_CONFIG, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        convert_policy(other, other, config=TINY_CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "other", "params", "policy"]


def test_verification_finds_a_changed_byte_and_discards_the_folder(tmp_path, tiny_params, monkeypatch):
    real = output_folder.save_file

    def corrupt(tensors, path, metadata=None):
        real(tensors, path, metadata=metadata)
        content = bytearray(Path(path).read_bytes())
        content[-1] ^= 1
        Path(path).write_bytes(content)

    monkeypatch.setattr(output_folder, "save_file", corrupt)
    with pytest.raises(ValueError, match="differs from its source"):
        convert_policy(tiny_params, tmp_path / "policy", config=TINY_CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params"]


def test_full_disk_is_one_error_and_leaves_nothing(tmp_path, tiny_params, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    with monkeypatch.context() as patch:
        patch.setattr(output_folder.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match=r"nothing was left behind.*needs 0.00 GB"):
            convert_policy(tiny_params, tmp_path / "policy", config=TINY_CONFIG)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output_folder, "save_file", full)
    with pytest.raises(OSError, match=r"nothing was left behind.*No space left"):
        convert_policy(tiny_params, tmp_path / "policy", config=TINY_CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params"]


def test_run_after_kill_succeeds_and_cleans_up(tmp_path, tiny_params):
    # A conversion that hangs after its first shard, killed there.
    code = (
        "import sys, time; import lapa.conversion.output_folder as folder\n"
        "from lapa.conversion.convert_checkpoints import convert_policy\n"
        "folder.verify_weights = time.sleep\n"
        "import lapa.conversion.convert_checkpoints as module\n"
        "module.verify_weights = lambda *args: (print('written', flush=True), time.sleep(600))\n"
        "convert_policy(sys.argv[1], sys.argv[2], config={'text_config': {'num_attention_heads': 2}})\n"
    )
    output = tmp_path / "policy"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_params), str(output)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"written\n"
    with pytest.raises(ValueError, match=f"still running .process {process.pid}"):
        convert_policy(tiny_params, output, config=TINY_CONFIG)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists() and len(list(tmp_path.glob("policy.partial-*/model.safetensors"))) == 1
    convert_policy(tiny_params, output, config=TINY_CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params", "policy"]
    assert LapaForLatentAction.from_pretrained(output)


def test_memory_does_not_follow_the_file(tmp_path):
    sizes = {"hidden-size": 768, "intermediate-size": 2048, "num-layers": 16, "num-heads": 8, "text-vocab-size": 1000}
    sizes |= {"vision-vocab-size": 500, "max-shard-bytes": 2 * 10**7, "chunk-bytes": 6 * 10**7}
    arguments = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, str(BENCHMARK), "--folder", str(tmp_path / "scratch"), *arguments]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert report["file_bytes"] > 220_000_000
    assert report["peak_bytes"] - report["imports_bytes"] < report["file_bytes"] / 2
