"""Maps the repository's top-level folders into the single namespace `lapa`."""

from pathlib import Path

from setuptools import setup

# Folders at the root of the repository that become `lapa.<folder>`; the front door `lapa/` itself comes first.
SUBPACKAGES = (
    "configuration",
    "processing",
    "modeling_lapa",
    "data",
    "training",
    "evaluation",
    "evaluation.baselines",
    "evaluation.environments",
    "serving",
    "conversion",
    "hub_cards",
)

CORE = [
    "torch>=2.6",
    "transformers>=5.23",
    "datasets>=5.0",
    "accelerate>=1.12",
    "peft>=0.19",
    "huggingface_hub>=1.31",
    "jinja2",
    "safetensors>=0.8",
    "trl>=1.10",
    "av>=17",
    "numpy>=2.0",
    "pillow>=11",
    "protobuf",
    "sentencepiece",
    "tensorboard",
    # Decoding JPEG and checking sums; where they have no wheel the readers do without, slower, with the same results.
    "google-crc32c>=1.7",
    "simplejpeg>=1.8",
]
EXTRAS = {
    # Conversion needs nothing beyond the core; the name exists so that `lapa[convert]` keeps meaning it.
    "convert": [],
    # The tabletop runs with pymunk 6.11 and 7; gym-pusht needs one below 7.
    "sim": ["gymnasium>=1.0", "pymunk>=6.11", "matplotlib>=3.9", "scipy>=1.14"],
    # Its wheel imports `packaging` without naming it.
    "metaworld": ["metaworld>=3.1.1", "packaging", "scipy>=1.14"],
    # What the simulator needs; itself it is on GitHub only, see docs/evaluation.md.
    "language-table": [
        "absl-py",
        "gymnasium>=1.0",
        "matplotlib>=3.9",
        "opencv-python-headless",
        "pybullet>=3.2.5; python_version < '3.12'",
        "scipy>=1.14",
    ],
    "pusht": ["gym-pusht>=0.1.8", "pymunk>=6.11,<7"],
    "quantize": ["bitsandbytes>=0.49"],
    "unipi": ["diffusers>=0.35"],
}
EXTRAS["dev"] = [
    *EXTRAS["sim"],
    *EXTRAS["quantize"],
    *EXTRAS["unipi"],
    "build",
    "hypothesis",
    "msgpack",
    "mypy",
    "opencv-python-headless",
    "pandas",
    # Drives the Chromium of the system; without one the tests of pages skip.
    "playwright",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "types-PyYAML",
    "wheel",
]

setup(
    name="lapa",
    version="0.1.0",
    description="Hugging Face-native latent action pretraining: from video to robot policies",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=["lapa", *(f"lapa.{name}" for name in SUBPACKAGES)],
    package_dir={"lapa": "lapa", **{f"lapa.{name}": name.replace(".", "/") for name in SUBPACKAGES}},
    package_data={
        "lapa": ["py.typed"],
        "lapa.evaluation": ["templates/*", "assets/*/*", "suites/*.yaml", "studies/*.yaml"],
        "lapa.training": ["recipes/*.yaml", "recipes/accelerate/*.yaml"],
        "lapa.hub_cards": ["templates/*"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["lapa=lapa.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
