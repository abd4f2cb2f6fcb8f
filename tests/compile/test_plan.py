"""The planner is one header for host and device: NVRTC compiles it for lengths that live on the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from flashinfer_core import compiler
from tiny_package import needs_nvrtc

KERNEL = """#include "core/plan.h"
#include "core/uniform.h"
namespace planning {
struct PlanParams {
  flashinfer::PlanShape shape;
  flashinfer::PlanLengths lengths;
  flashinfer::PlanScratch scratch;
  flashinfer::PlanBuffers out;
  flashinfer::UniformWork uniform;
};
template <int kThreads>
__global__ void run(const __grid_constant__ PlanParams p) {
  if (threadIdx.x == 0) {
    const flashinfer::OneThread team;
    const flashinfer::PlanSums sums = flashinfer::sum_requests(team, p.shape, p.lengths, p.scratch);
    flashinfer::write_plan(team, p.shape, p.lengths, sums, p.scratch, p.out);
  }
  const int32_t index = static_cast<int32_t>(threadIdx.x);
  p.out.items[index] =
      flashinfer::uniform_item(p.uniform, p.shape.group, p.shape.kv_heads, p.shape.tile_rows, p.shape.kv_tile, index);
  p.out.merges[index] = flashinfer::uniform_merge(p.uniform, p.shape.group, p.shape.tile_rows, index);
}
}  // namespace planning
"""


@dataclass(frozen=True)
class Planning:
    """A kernel that calls every device function of plan.h and uniform.h."""

    package: str = "planning"
    source: str = "planning.cuh"
    name: str = "planning"
    expression: str = "planning::run<32>"
    threads: int = 32
    shared_bytes: int = 0


@needs_nvrtc
@pytest.mark.compile
@pytest.mark.parametrize("target", ["sm_75", "sm_90a"])
def test_the_planner_compiles_for_gpus(target: str, tmp_path: Path) -> None:
    (tmp_path / "planning.cuh").write_text(KERNEL)
    image = compiler.compile_image(Planning(), target, kernels=tmp_path)
    assert image.payload
