"""One report of runs and studies: an HTML file that needs nothing else, Markdown, PNG and CSV.

python tools/report.py FOLDER [FOLDER ...] --output-dir DIR [--data IMAGES] [--title TEXT]

FOLDER is the folder of a pretraining run, of detection trials (--trials), of an evaluation of
features (linear, kNN, SVM) or of a study; their sections follow in the order given. With --data,
the images a run was trained on, augmented views and nearest neighbours are shown.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detection.report_sections import detection_sections, is_detection_result  # noqa: E402
from moco.config import load_pretrain_config  # noqa: E402
from moco.data.exclude import RECORD_FILE, without  # noqa: E402
from moco.data.images import find_images  # noqa: E402
from moco.data.rgb import Decoding  # noqa: E402
from moco.errors import CheckpointError, ConfigError, exit_on_error  # noqa: E402
from moco.methods import build_method  # noqa: E402
from moco.reporting.page import Section, Table, write_report  # noqa: E402
from moco.reporting.pictures import nearest_neighbours, view_pairs  # noqa: E402
from moco.reporting.pretraining import is_pretraining_run, pretraining_sections  # noqa: E402
from moco.reporting.studies import study_sections  # noqa: E402
from moco.training import checkpoint as ckpt  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR")
    parser.add_argument("--data", metavar="IMAGES", help="the images of the pretraining run")
    parser.add_argument("--title", default="MoCo transfer benchmark")
    return parser.parse_args(argv)


@exit_on_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    sections: list[Section] = []
    for number, folder in enumerate(args.folders):
        name = f"{number}_{folder.name}" if len(args.folders) > 1 else folder.name
        sections += _sections(folder, name or "run", args.data)
    path = write_report(args.title, sections, args.output_dir)
    print(f"report: {path} ({path.stat().st_size / 2**20:.1f} MiB), {path.with_suffix('.md')}")
    return 0


def _sections(folder: Path, name: str, data: str | None) -> list[Section]:
    if is_pretraining_run(folder):
        pictures = _pictures(folder, data) if data else []
        return pretraining_sections(folder, name) + pictures
    results = folder / "results.json"
    if results.is_file():
        content = ckpt.read_json(results)
        if is_detection_result(content):
            return detection_sections(folder, name)
        if isinstance(content, dict) and "rows" in content and "title" in content:
            return study_sections(content, name)
        if isinstance(content, dict) and "metric" in content:
            return [_evaluation_section(content)]
    raise ConfigError(
        f"{folder}: holds no run that is known here; give a folder with log.jsonl and config.yaml "
        "(pretraining), or with the results.json of trials, an evaluation or a study"
    )


def _evaluation_section(content: dict) -> Section:
    """Linear classification, fine-tuning, kNN or SVMs: every plain figure of its results."""
    rows = [
        [key, f"{value:.2f}" if isinstance(value, float) else str(value)]
        for key, value in content.items()
        if isinstance(value, str | int | float)
    ]
    title = str(content.get("engine", "evaluation of features"))
    title = title if title.startswith("kNN") else title[0].upper() + title[1:]
    return Section(title, [Table(("", ""), rows)])


def _pictures(folder: Path, data: str) -> list[Section]:
    cfg = load_pretrain_config(str(folder / "config.yaml"))
    source = find_images(data, Decoding.of(cfg.DATA))
    if (folder / RECORD_FILE).is_file():
        source = without(source, ckpt.read_json(folder / RECORD_FILE)["images"])
    path, _, _ = ckpt.latest_verified(folder)
    if path is None:
        return [view_pairs(cfg, source)]
    method = build_method(cfg, len(source))
    state = ckpt.read_torch_file(path)["state_dict"]
    try:
        method.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: does not fit {folder / 'config.yaml'} with the images of --data {data} "
            f"({' '.join(str(error).split())[:200]}); give the images the run was trained on"
        ) from error
    encoder = method.transfer_encoder()
    return [view_pairs(cfg, source), nearest_neighbours(encoder, cfg, source)]


if __name__ == "__main__":
    main()
