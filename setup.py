"""Packaging of the MoCo v2 transfer benchmark: the packages `moco` and `detection`."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="moco-transfer-benchmark",
    version="0.1.0",
    description="MoCo v2 pretraining and its transfer to PASCAL VOC detection (R50-C4)",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["moco", "moco.*", "detection", "detection.*"]),
    package_data={"detection": ["published.yaml"], "moco": ["kernels/*.cpp", "kernels/*.h"]},
    install_requires=[
        "torch>=2.10",  # a security floor: fixes of code execution in weights-only loading
        "torchvision>=0.25",
        "fvcore>=0.1.5.post20221221",  # CfgNode and schedules, the ones Detectron2 uses
        "numpy>=1.26",
        "pillow>=12.2",  # a security floor: reads images of strangers (CVE-2026-25990 and before)
        "opencv-python-headless>=4.10",  # the default augmentation; 4.10 is the first with numpy 2
        "pycocotools>=2.0.7",  # COCO's own metric, and its masks
        "PyYAML>=6",
        "tensorboard>=2.14",
        "tqdm>=4.66.3",
        "matplotlib>=3.7",
        "scipy>=1.11",  # Welch's interval in the report
        "safetensors>=0.4.3",  # weights files without pickle
        "xxhash>=3.4",  # tells equal image files; SHA-256 takes twenty times as long
    ],
    extras_require={
        "probes": ["scikit-learn>=1.5"],  # tools/evaluate_svm.py
        "test": [
            "pytest>=8", "pytest-xdist>=3.5", "ruff>=0.6", "scikit-learn>=1.5",
            "hypothesis>=6",  # the fuzz of our parsers
        ],
    },
)
