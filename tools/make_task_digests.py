"""The digests of the built-in tasks: peftzoo/assets/task_digests.json.

python tools/make_task_digests.py [--same]

Needed after a task file was changed, with its `version` raised: the version is part of the ids of its runs.
With --same the version may stay as it is: for changes that ask, train and score the same, such as another
title. Runs then keep their ids.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from peftzoo.tasks import task_files


def current() -> dict[str, dict[str, Any]]:
    """Version and digest of every built-in task, and of every group that is trained together."""
    together = [name for name in task_files.groups() if task_files.expand([name]) == [name]]
    groups = map(task_files.task_group, sorted([*task_files.tasks(), *together]))
    return {g.name: {"version": g.version, "digest": g.digest} for g in groups}


def main() -> None:
    """Write the table, unless a task was changed whose version was not raised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--same", action="store_true", help="changed tasks ask the same as before")
    args = parser.parse_args()
    old = json.loads(task_files.DIGESTS.read_text()) if task_files.DIGESTS.is_file() else {}
    new = current()
    changed = [n for n in new if n in old and new[n]["digest"] != old[n]["digest"]]
    if not args.same and (same_version := [n for n in changed if new[n]["version"] <= old[n]["version"]]):
        sys.exit(
            f"changed, but not in version: {', '.join(same_version)}: raise metadata.version of these files, "
            "or say that they ask the same with --same"
        )
    lines = [f"{json.dumps(name)}: {json.dumps(facts)}" for name, facts in new.items()]
    task_files.DIGESTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{task_files.DIGESTS}: {len(new)} tasks, {len(changed)} changed")


if __name__ == "__main__":
    main()
