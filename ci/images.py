"""What the images of all packages take of each GPU architecture: `python -m ci.images [--write FILE]`, no GPU needed.

Registers, stack and static shared memory are read off the cubins, spills off the log of the assembler that wrote them.
Returns 1 where an image spills or does not fit.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Optional, Sequence

from ci import compiled, cubin
from ci.commit import commit
from ci.occupancy import CHIPS, ctas_of_sm

if TYPE_CHECKING:
    from flashinfer_core.images import Image
    from flashinfer_core.variant import Variant

PACKAGES = ("attention", "page", "lora")


@dataclass(frozen=True)
class Use:
    """What one image takes of one architecture. Bytes: `stack` and `spills` of a thread, `shared` of a CTA."""

    target: str
    name: str
    threads: int
    registers: int
    stack: int
    spills: int
    shared: int

    @property
    def ctas(self) -> int:
        """Count the CTAs that an SM holds at once."""
        chip = CHIPS[self.target]
        return ctas_of_sm(chip, threads=self.threads, registers=self.registers, shared_bytes=self.shared)

    @property
    def occupancy(self) -> float:
        """Return the part of an SM's warps that are in use."""
        return self.ctas * -(-self.threads // 32) / CHIPS[self.target].warps

    @property
    def fits(self) -> bool:
        return self.ctas > 0 and self.spills == 0


def use(image: Image, variant: Variant) -> Use:
    """Read what `image` takes; `variant` knows its threads and dynamic shared memory."""
    read = cubin.resources(image.payload, image.entry)
    return Use(
        target=image.target,
        name=image.name,
        threads=variant.threads,
        registers=read.registers,
        stack=read.stack_bytes,
        spills=image.spill_bytes or 0,
        shared=read.shared_bytes + variant.shared_bytes,
    )


def measure(targets: Sequence[str], nvrtc: Optional[str] = None) -> List[Use]:
    """Compile every shipped variant of every package for `targets`, or take it from the build's cache, and read it."""
    if importlib.util.find_spec("flashinfer_core") is None:  # nothing is installed: the tree's own
        sys.path.insert(0, str(compiled.ROOT / "packages" / "core" / "src"))
    from flashinfer_core.build import build_images

    found: List[Use] = []
    for package in PACKAGES:
        source = compiled.ROOT / "packages" / package / "src" / f"flashinfer_{package}"
        shipped = compiled.load(f"{source.name}_variants", source / "variants.py").shipped
        variants: Dict[str, Dict[str, Variant]] = {target: {v.name: v for v in shipped(target)} for target in targets}
        with tempfile.TemporaryDirectory() as out:
            built = build_images(
                source / "kernels",
                shipped,
                targets,
                Path(out),
                compiled.cache() / "compiled",
                nvrtc=nvrtc,
                report=lambda line: print(line, file=sys.stderr, flush=True),
            )
        found += [use(one.image, variants[one.image.target][one.image.name]) for one in built]
    return found


def summary(uses: Sequence[Use]) -> List[str]:
    """Return a Markdown table with a line for each target."""
    lines = [
        "| target | images | spilling | most registers | most shared, of limit | warps in use of an SM's |",
        "|---|---|---|---|---|---|",
    ]
    for target in dict.fromkeys(use.target for use in uses):
        of_target, chip = [use for use in uses if use.target == target], CHIPS[target]
        filled = [100 * use.occupancy for use in of_target]
        lines.append(
            f"| {target} | {len(of_target)} | {sum(use.spills > 0 for use in of_target)} "
            f"| {max(use.registers for use in of_target)} "
            f"| {_kib(max(use.shared for use in of_target))} of {_kib(chip.shared_of_cta)} KiB "
            f"| {min(filled):.0f} to {max(filled):.0f} % |"
        )
    return lines


def table(uses: Sequence[Use], target: str) -> List[str]:
    """Return a Markdown table with a line for each image of `target`."""
    limit = CHIPS[target].shared_of_cta
    shared = f"KiB of shared, of {_kib(limit)}"
    lines = [
        f"| image | threads | registers | spills | stack | {shared} | CTAs of an SM | warps in use |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in sorted((one for one in uses if one.target == target), key=lambda one: one.name):
        lines.append(
            f"| {one.name} | {one.threads} | {one.registers} | {one.spills} | {one.stack} "
            f"| {_kib(one.shared)} ({100 * one.shared / limit:.0f} %) | {one.ctas} | {100 * one.occupancy:.0f} % |"
        )
    return lines


def _kib(count: int) -> str:
    return f"{count / 1024:.1f}".rstrip("0").rstrip(".")


def report(uses: Sequence[Use], source: str, date: str) -> str:
    """Return all tables as one Markdown page."""
    lines = [
        "# What the GPU images take",
        "",
        f"{date}, {source}. Regenerate: `nox -s images -- --write docs/benchmarks/images.md`; no GPU is needed.",
        "",
        "Registers, and bytes of spills and stack, are of a thread. Shared memory, static and dynamic, is of a CTA,",
        "next to what one CTA may have at most. CTAs of an SM: as many as its warps, registers and shared memory hold.",
        "",
        *summary(uses),
    ]
    for target in dict.fromkeys(use.target for use in uses):
        lines += ["", f"## {target}", "", *table(uses, target)]
    return "\n".join(lines) + "\n"


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(prog="python -m ci.images", description=__doc__)
    parser.add_argument("--target", default=",".join(CHIPS), help="comma list (default: every one that has a cubin)")
    parser.add_argument("--write", type=Path, help="also write the page to this file")
    options = parser.parse_args(arguments)
    nvrtc = os.environ.get("FLASHINFER_CUDA") or None
    uses = measure(options.target.split(","), nvrtc)
    from flashinfer_core.nvrtc import find

    source = f"commit {commit() or 'unknown'}, {find(nvrtc).identity}"
    page = report(uses, source, datetime.date.today().isoformat())
    print(page)
    if options.write:
        options.write.write_text(page)
    unfit = [f"{one.name} for {one.target}" for one in uses if not one.fits]
    if unfit:
        print(f"spill or do not fit: {', '.join(unfit)}", file=sys.stderr)
    return 1 if unfit else 0


if __name__ == "__main__":
    sys.exit(main())
