"""How many cores this process may use: its affinity, and the quotas of its control groups."""

from __future__ import annotations

import math
from pathlib import Path


def available_cores() -> float:
    """Cores this process may use: its affinity, cut by the cgroup's CPU quotas."""
    return min(cores_by_affinity(), cpu_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))


def cores_by_affinity() -> int:
    """Cores that this process may run on, however much of them it may use."""
    import psutil

    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1


def cpu_quota(membership: Path, mounted: Path) -> float:
    """Cores that a control group and those above it allow, see cgroups(7).

    Args:
        membership: A process's groups, as `/proc/self/cgroup` lists them.
        mounted: Where version 2 is mounted, or version 1 with a folder a controller.

    Returns:
        Cores, infinite without a quota. A group that is not visible, as from inside a container of its own, is taken to
        be mounted itself.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = [math.inf]
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = mounted / controllers if controllers else mounted
        group = top / path.strip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            found.append(_quota_of(folder))
    return min(found)


def _quota_of(folder: Path) -> float:
    """Cores that one control group allows by itself."""
    try:
        if (version_2 := folder / "cpu.max").is_file():
            quota, period = version_2.read_text(encoding="ascii").split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
            )
        return math.inf if quota == "max" or int(quota) <= 0 else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf
