"""What a registered model says about itself."""

import json
from pathlib import Path

from raydml.tracking.model_card import facts_of


def test_texts_of_a_study_are_only_texts_in_the_card(tmp_path: Path) -> None:
    model, study = tmp_path / "model", tmp_path / "study"
    model.mkdir()
    study.mkdir()
    data = {"name": "<img src=x onerror=alert(1)>", "content": "0b7e", "split": {"fold": 0}}
    trial = {"data": data, "loss": {"name": "[a](javascript:alert(1))"}, "epochs": 3}
    network = {"backbone": "<script>1</script>", "embedding_dim": 8}
    (model / "config.json").write_text(json.dumps({"network": network, "trial": trial}))
    score = {"map_at_r": {"mean": 0.6, "half_width": 0.1}}
    final = {"metrics": score, "protocols": {"leave_one_out": "leave <b>one</b> out"}, "runs": [{}]}
    summary = {"metric": "val_map_at_r", "question": "is <MIC>\n# better?", "final": [final], "confirm": []}
    summary |= {"study": "s", "search": [], "plan": {}}
    (study / "summary.json").write_text(json.dumps(summary))
    card = facts_of("birds", model, study).card
    for text in (r"\<img src=x", r"\[a\](javascript", r"\<script\>1", r"leave \<b\>one", r"is \<MIC\> # better?"):
        assert text in card
    assert "| MAP@R&emsp; | 0.6000 ± 0.1000 |" in card
    assert "<" not in card.replace(r"\<", "").replace("$(base64 -w0 one.jpg)", "")
