"""A kernel package of two files in a temporary folder, for tests of the way from source to launch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from flashinfer_core import images, nvrtc
from flashinfer_core.errors import InstallationError
from flashinfer_core.images import Image

_CUDA = """#include "core/types.h"
#include "tiny/scale.h"
namespace tiny {
template <int kFactor>
__global__ void scale(const __grid_constant__ ScaleParams p) {
  __shared__ int32_t staged[32];
  staged[threadIdx.x] = p.data[threadIdx.x];
  __syncthreads();
  p.data[threadIdx.x] = kFactor * staged[31 - threadIdx.x];
}
}  // namespace tiny
"""

_CPU = """#include "tiny/scale.h"
namespace tiny {
template <int kFactor>
void scale(const ScaleParams& p, int32_t worker, int32_t num_workers) {
  for (int32_t i = worker; i < p.count; i += num_workers) p.data[i] *= kFactor;
}
}  // namespace tiny
"""

HEADER = """#pragma once
#include "core/types.h"
namespace tiny {
struct ScaleParams {
  int32_t* data;
  int32_t count;
  int32_t pad;
};
static_assert(sizeof(ScaleParams) == 16, "host and device disagree on ScaleParams");
}  // namespace tiny
"""


@dataclass(frozen=True)
class Scale:
    """One instance of `tiny::scale`."""

    factor: int = 3
    source: str = "tiny/scale.cuh"
    package: str = "tiny"

    threads = 32
    shared_bytes = 0

    @property
    def name(self) -> str:
        return f"scale-{self.factor}"

    @property
    def expression(self) -> str:
        return f"tiny::scale<{self.factor}>"


GPU = Scale()
CPU = Scale(source="tiny/scale.cpp")


def write(folder: Path) -> Path:
    """Write the package below `folder`, which must be on the import path; return the package's folder."""
    kernels = folder / "tiny" / "kernels" / "tiny"
    kernels.mkdir(parents=True)
    (folder / "tiny" / "__init__.py").touch()
    for name, text in (("scale.cuh", _CUDA), ("scale.cpp", _CPU), ("scale.h", HEADER)):
        (kernels / name).write_text(text)
    return folder / "tiny"


def find(variant: Scale, *targets: str) -> Image:
    """Return the image of one variant for the first of `targets` that there is one for."""
    return images.find_first(dict.fromkeys(targets, variant))


def edit(package: Path) -> None:
    """Change a header that every kernel of the package includes."""
    header = package / "kernels" / "tiny" / "scale.h"
    header.write_text(header.read_text() + "// changed\n")


def _no_nvrtc() -> str:
    try:
        nvrtc.find()
    except InstallationError as error:
        return str(error)
    return ""


needs_nvrtc = pytest.mark.skipif(bool(_no_nvrtc()), reason=_no_nvrtc())
