"""The package. Ranges are those that the tests run with; constraints/ holds the exact sets."""
from pathlib import Path
import re

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (HERE / "vlm_jax" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE).group(1)

TEST = ["pytest>=9", "pytest-xdist>=3.8", "pytest-timeout>=2.4", "hypothesis>=6.100", "ruff>=0.17,<0.18", "setuptools>=77",
        "tensorboardX>=2.6.5", "diffusers>=0.42,<0.43"]
HF = ["tokenizers>=0.21", "jinja2>=3.1.6"]
TPU = "jax[tpu]>=0.10.2,<0.13"   # with the libtpu that this jax names, which also compiles for TPUs that are not there
NOTEBOOKS = ["jupytext>=1.19", "nbclient>=0.11", "nbformat>=5.10", "ipykernel>=7"]

setup(
    name="vlm_jax",
    version=VERSION,
    description="Vision-language models in JAX/Flax",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=find_packages(include=["vlm_jax", "vlm_jax.*"]),   # follows the link vlm_jax/configs
    package_data={"": ["py.typed", "*.json", "*.txt", "*.html", "*.css"]},
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "tensorflow-datasets>=4.9.10,<5",
        "importlib_resources>=6",       # tensorflow-datasets imports it without asking for it
        "array_record>=0.8.3",
        "ml_collections>=1.1,<2",
        "sentencepiece>=0.2,!=0.2.1",   # 0.2.1 crashes
        "numpy>=2",
        "ml_dtypes>=0.5",               # bfloat16 and float8 of weight files
        "Pillow>=11",
        "pyarrow>=20",
        "scikit-learn>=1.6",            # the scanned digits
        "emoji>=2.14",                  # names of emoji in 14 languages
        "matplotlib>=3.9",
        "jaxtyping>=0.3",
        "etils[epath]>=1.12",
        "absl-py>=2.1",
    ],
    extras_require={
        "tpu": [TPU],
        "cuda": ["jax[cuda13]>=0.10.2,<0.13"],
        "tf": ["tensorflow-cpu>=2.21"],             # data.prepare: public sets whose builders need TensorFlow
        "hf": HF,                                   # tokenizer.json and chat templates of published models
        "parity": ["torch>=2.13", "transformers>=5.23,<6"],
        "lmms_eval": ["lmms-eval>=0.7.3,<0.8"],      # its tasks on our models (docs/evaluation.md)
        "notebooks": NOTEBOOKS,
        "test": TEST + HF + NOTEBOOKS + [f"{TPU}; platform_system == 'Linux' and platform_machine == 'x86_64'"],
    },
    entry_points={"lmms_eval.models": ["vlm_jax = vlm_jax.evaluation.lmms_eval:manifest"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
