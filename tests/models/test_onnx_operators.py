"""Node cases of ``onnx.backend.test``: what is imported is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import onnx_operators as nodes

# of operators that this package converts itself, where TVM's conversion is wrong or lacks something
TILE = "LLVM vectorises a loop over i % 4 as if it were i, on CPUs with AVX-512"
CASES = [
    "test_argmax_default_axis_example_select_last_index",
    "test_attention_24_qk_matmul_output_mode3_softmax_precision",
    "test_attention_4d_attn_mask_causal_bf16",
    "test_averagepool_2d_ceil",
    "test_bitshift_right_uint8",
    "test_clip_default_int8_inbounds",
    "test_scatter_elements_with_negative_indices",
    "test_cumsum_2d_negative_axis",
    "test_dequantizelinear_axis",
    "test_dynamicquantizelinear",
    "test_einsum_batch_matmul",
    "test_expand_dim_changed",
    "test_eyelike_with_dtype",
    "test_gather_negative_indices",
    "test_gemm_all_attributes",
    "test_group_normalization_epsilon",
    "test_isinf_negative",
    "test_layer_normalization_4d_axis1",
    "test_matmulinteger",
    "test_maxpool_2d_ceil",
    "test_mod_mixed_sign_int32",
    "test_onehot_negative_indices",
    "test_pow_types_int32_float32",
    "test_qlinearmatmul_2D_uint8_float32",
    "test_reduce_log_sum_exp_do_not_keepdims_random",
    "test_reduce_max_empty_set",
    "test_resize_upsample_scales_linear_align_corners",
    "test_slice_neg_steps",
    "test_spacetodepth_crd_mode_example",
    "test_split_variable_parts_1d_opset18",
    pytest.param("test_tile", marks=pytest.mark.xfail(reason=TILE, strict=False)),
    "test_top_k_smallest",
    "test_where_long_example",
]


@pytest.mark.parametrize("name", CASES)
def test_a_node_is_right(name: str) -> None:
    outcome = nodes.run_case(nodes.node_cases()[name])
    assert outcome.status == nodes.RIGHT, outcome.text


@pytest.mark.large
@pytest.mark.timeout(3600)
def test_the_table_of_operators(tmp_path: Path) -> None:
    path = tmp_path / "operators-onnx.md"
    assert nodes.main(["-o", str(path)]) == 0, path.read_text()
