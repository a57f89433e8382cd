"""Write the backbone of a checkpoint for other libraries.

python tools/export.py RUN|FILE OUT.pth --format torchvision [--encoder query|key]
python tools/export.py RUN|FILE OUT.pth --format timm
python tools/export.py RUN|FILE OUT.safetensors --format safetensors

RUN is a run folder: its newest checkpoint that verifies is taken. FILE is a checkpoint of this
project, of the reference, or of another in a layout of docs/CHECKPOINTS.md. The file written is
checked before: a network built from it must give bitwise the source's features.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moco.errors import exit_on_error  # noqa: E402
from moco.training.export import FORMATS, export_backbone, report_path  # noqa: E402
from moco.training.layouts import ENCODERS  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="RUN|FILE", help="run folder or weights file")
    parser.add_argument("out", metavar="OUT", help="file to write: .pth or .safetensors")
    parser.add_argument("--format", required=True, choices=FORMATS, dest="form")
    parser.add_argument(
        "--encoder", choices=ENCODERS, default="query", help="key: the momentum copy"
    )
    parser.add_argument(
        "--num-heads", type=int, metavar="N", help="of a ViT, where the file does not say it"
    )
    parser.add_argument(
        "--drop", action="append", default=[], metavar="PREFIX",
        help="names of unknown tensors beside the network begin so: leave them out; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT where it holds something else"
    )
    return parser.parse_args(argv)


@exit_on_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    done = export_backbone(
        args.source,
        args.out,
        form=args.form,
        encoder=args.encoder,
        num_heads=args.num_heads,
        drop=args.drop,
        overwrite=args.overwrite,
    )
    backbone, record = done.backbone, done.record
    for _, reason in done.refused:
        print(f"passed over: {reason}")
    print(
        f"source: {done.source} ({backbone.layout} layout, {backbone.encoder} encoder, "
        f"{backbone.network.arch})"
    )
    for note in backbone.notes:
        print(f"note: {note}")
    print(f"mapped: {len(backbone.names)} tensors")
    for reason, names in backbone.dropped.items():
        print(f"dropped: {len(names)} tensors, {reason}")
    check = record["self_check"]
    print(
        f"self-check: {check['features']} features of a random image, "
        f"{check['source_network']} with the source's tensors and {check['file_network']} with "
        "the file's, bitwise equal"
    )
    state = "wrote" if done.is_new else "unchanged, holds these bytes already"
    print(f"{state}: {done.out} (sha256 {record['output_sha256']}) and {report_path(done.out)}")
    missing = ", ".join(record["missing_there"]) or "nothing"
    print(f"for: {record['network']}; of its tensors the file lacks {missing}")


if __name__ == "__main__":
    main()
