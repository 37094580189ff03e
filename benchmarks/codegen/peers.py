"""The kernels of memeff and Inf-CL as their own launchers would start them, to be compiled beside ours.

Neither is a dependency: `pip install --no-deps --target DIR memeff==0.3.1 inf-cl==1.2.1` puts them
where gpu_codegen.py's --peers finds them. Their block sizes are asked of their code where it has a
table, and are otherwise those of the launches in their source.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

from codegen.kernels import Source
from supcon_kernels.triton_launch import Constexpr, Launch

DEFAULT_WARPS, DEFAULT_STAGES = 4, 3  # Triton's own, where a launch names none


def peer_sources(directory: Path, dims: Iterable[int], archs: Iterable[int]) -> list[Source]:
    """Their pair kernels, in bfloat16 where they take it."""
    sys.path.insert(0, str(directory.resolve()))
    return [
        source
        for dim in dims
        for arch in archs
        for source in (*_memeff_sources(dim, arch), *_inf_cl_sources(dim, arch))
    ]


def _memeff_sources(dim: int, arch: int) -> list[Source]:
    """The denominators, and the gradient of one tower, which a step launches for each."""
    from memeff import _common

    capability = (arch // 10, arch % 10)
    with mock.patch("torch.cuda.get_device_capability", lambda device=None: capability):
        if not _common.fa_ok(dim, None):
            return []
        block_i, block_j, num_warps, num_stages = _common.fa_blocks(None, dim)
    features, sums = "*bf16", "*fp32"
    denominators = Launch(
        kernel="clip_denom_kernel",
        signature={
            **{"X_ptr": features, "Y_ptr": features},
            **{"sum_exp_row_ptr": sums, "sum_exp_col_ptr": sums},
            **{"n_i": "i32", "n_j": "i32", "inv_temperature": "fp32"},
        },
        constexprs={
            **{"BLOCK_SIZE_I": 128, "BLOCK_SIZE_J": 128, "BLOCK_SIZE_D": _common.check_dims(dim)},
            **{"D_MODEL": dim, "INPUT_PRECISION": "tf32"},
        },
        divisible_by_16=("X_ptr", "Y_ptr", "sum_exp_row_ptr", "sum_exp_col_ptr", "n_i", "n_j"),
        num_warps=DEFAULT_WARPS,
        num_stages=DEFAULT_STAGES,
        grid=(1, 1, 1),
    )
    gradient = Launch(
        kernel="clip_fa_grad_kernel",
        signature={
            **{"A_ptr": features, "B_ptr": features, "div_own_ptr": sums, "div_other_ptr": sums},
            **{"dA_ptr": sums, "inv_temperature": "fp32", "grad_scale": "fp32"},
            **{"n_own": "i32", "n_other": "i32"},
        },
        constexprs={
            **{"BIDIR": True, "BLOCK_SIZE_I": block_i, "BLOCK_SIZE_J": block_j},
            **{"D_POW2": 1 << (dim - 1).bit_length(), "D_MODEL": dim, "INPUT_PRECISION": "tf32"},
        },
        divisible_by_16=(
            *("A_ptr", "B_ptr", "div_own_ptr", "div_other_ptr", "dA_ptr"),
            *("n_own", "n_other"),
        ),
        num_warps=num_warps,
        num_stages=num_stages,
        grid=(1, 1, 1),
    )
    modules = {"memeff.distributed_clip_loss": denominators, "memeff.clip_loss": gradient}
    return [
        Source("memeff 0.3.1", module, launch.kernel, "bfloat16", dim, arch, launch)
        for module, launch in modules.items()
    ]


def _inf_cl_sources(dim: int, arch: int) -> list[Source]:
    """Forward and the two halves of the backward; features are widened to float32 before them.

    They are cut into heads, of 256 features unless told otherwise; here one head holds all, which
    spares the kernels a loop.
    """
    if dim > 256:
        return []
    # One head is a constant: Triton specialises integers that are 1.
    constexprs: dict[str, Constexpr] = {"nheads": 1, "BLOCK_HEADDIM": dim}
    constexprs |= {"BLOCK_M": 64, "BLOCK_N": 64}
    operands = {
        "_prob_fwd_kernel": ("Q", "K", "LSE"),
        "_dq_prob_bwd_kernel": ("Q", "K", "dQ", "LSE", "dLSE"),
        "_dk_prob_bwd_kernel": ("Q", "K", "dK", "LSE", "dLSE"),
    }
    return [
        Source(
            "Inf-CL 1.2.1",
            "inf_cl.flash",
            kernel,
            "float32",
            dim,
            arch,
            Launch(
                kernel=kernel,
                signature=dict.fromkeys(pointers, "*fp32") | {"seqlen_q": "i32", "seqlen_k": "i32"},
                constexprs=constexprs,
                divisible_by_16=(*pointers, "seqlen_q", "seqlen_k"),
                num_warps=8,
                num_stages=1,
                grid=(1, 1, 1),
            ),
        )
        for kernel, pointers in operands.items()
    ]
