"""quantization_config: what is not understood is refused by the name of its field."""

from typing import Any

import pytest

from glm52.errors import CheckpointError
from glm52.schemes import Quantization

WEIGHTS = {"num_bits": 4, "type": "int", "group_size": 128, "strategy": "group"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
AWQ, GPTQ = ({"quant_method": method, "bits": 4, "group_size": 128} for method in ("awq", "gptq"))
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized",
              "config_groups": {"g": {"weights": WEIGHTS, "targets": ["Linear"]}}}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "key"),
    [(FP8, "modules_to_not_convert"), (AWQ, "modules_to_not_convert"), (GPTQ, "modules_to_not_convert"),
     (GPTQ, "dynamic"), (COMPRESSED, "ignore"), (COMPRESSED, "config_groups")],
)  # fmt: skip
def test_lists_of_the_wrong_kind_name_the_field(config: dict[str, Any], key: str) -> None:
    """These were tracebacks, and a string was a list of its letters."""
    for value in (5, True, 1.5, "lm_head", [5], [None], [[]]):
        with pytest.raises(CheckpointError, match=f"^quantization_config.{key}: expected"):
            Quantization.parse(config | {key: value})
    for value in (5, "Linear", [None]):
        with pytest.raises(CheckpointError, match=r"config_groups\.g\.targets: expected"):
            Quantization.parse(COMPRESSED | {"config_groups": {"g": {"weights": WEIGHTS, "targets": value}}})


def test_names_stand_in_a_list_or_are_the_keys_of_an_object() -> None:
    assert Quantization.parse(FP8 | {"modules_to_not_convert": ["lm_head"]}).ignored == ("lm_head",)
    assert Quantization.parse(GPTQ | {"dynamic": {"-:.*gate": {}}}).ignored == ("re:.*gate",)
    assert Quantization.parse(COMPRESSED | {"ignore": None}).ignored == ()


@pytest.mark.parametrize("pattern", ["(", "(" * 5000, "a{99999999999}"])
def test_patterns_that_are_none(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="is not a pattern"):
        Quantization.parse(COMPRESSED | {"ignore": [f"re:{pattern}"]})
