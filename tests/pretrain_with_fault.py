"""tools/pretrain.py with a fault at each start; for launchers that start it again.

python tests/pretrain_with_fault.py FAULTS FOLDER [flags of tools/pretrain.py]

FAULTS: JSON, of each start a list: ["stop", HOW, STEP, RANK] as of faults.Stop, ["forget", PART] as
of faults.forget, or any other function of faults.py with its arguments; none after the last.
FOLDER: receives `start_N.RANK` as a rank starts, with the time of its first step as its content,
and `killed_N.RANK`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import faults  # noqa: E402
from scripts import load_tool  # noqa: E402


def main() -> None:
    given, folder, *flags = sys.argv[1:]
    rank = int(os.environ.get("RANK", "0"))
    starts = json.loads(given)
    number = len(list(Path(folder).glob(f"start_*.{rank}")))
    started = Path(folder, f"start_{number}.{rank}")
    started.touch()
    die = faults.die

    def die_noted() -> None:
        Path(folder, f"killed_{number}.{rank}").write_text(str(time.time()))
        die()

    faults.die = die_noted
    faults.after_first_step(lambda: started.write_text(str(time.time())))
    if number < len(starts):
        name, *words = starts[number]
        if name == "stop":
            faults.arm(faults.Stop(*words), rank)
        else:
            getattr(faults, name)(*words)
    load_tool("pretrain").main(flags)


if __name__ == "__main__":
    main()
