"""What the recall model of models/recall.py answers through ./run is what it answers in PyTorch:
tests/data/recall.json has the questions, the answers and PyTorch's score."""
import json
import pathlib
import subprocess

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = json.loads((ROOT / "tests" / "data" / "recall.json").read_text())


@pytest.mark.parametrize("pairs", DATA["tests"])
def test_accuracy(pairs, tmp_path):
    right = asked = 0
    for tokens, answers in zip(DATA["tests"][pairs]["tokens"], DATA["tests"][pairs]["answers"]):
        subprocess.run([ROOT / "run", ROOT / "tests" / "data" / "recall.bin", "--tokens",
                        " ".join(map(str, tokens)), "-n", "0",
                        "-q", "--dump-logits", tmp_path / "logits"], check=True,
                       capture_output=True)
        said = np.fromfile(tmp_path / "logits", "<f4").reshape(len(tokens), -1).argmax(1)
        answers = np.array(answers)
        right += int((said == answers)[answers >= 0].sum())
        asked += int((answers >= 0).sum())
    assert asked == 32 * int(pairs)
    assert round(right / asked, 5) == DATA["accuracy in PyTorch"][pairs]
    assert right / asked > 0.9                           # chance is 1 in 256
