"""What is said where a model cannot be had in 4 bits; with bitsandbytes: tests/train/test_qlora."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cwdpo_bench.errors import UserError
from cwdpo_bench.vlm import is_quantized, load_vlm, quantized
from cwdpo_bench.vlm.quantized import need_bitsandbytes, refuse_none_quantized


def test_a_missing_bitsandbytes_is_told_with_its_extra(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'cwdpo-bench\[qlora\]'"):
        load_vlm(tiny_model_folder, load_in_4bit=True)


def test_a_bitsandbytes_that_does_not_load_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bitsandbytes.py").write_text("raise RuntimeError('no library for this GPU')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"no library for this GPU.*load_in_4bit=false"):
        need_bitsandbytes()


def test_a_model_without_a_layer_in_4_bits_is_refused(tiny_model_folder: Path) -> None:
    model = load_vlm(tiny_model_folder).model
    assert not is_quantized(model)
    with pytest.raises(UserError, match=r"'qwen2_5_vl' has no linear layers"):
        refuse_none_quantized(model, "name")
