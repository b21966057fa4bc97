"""The worked example of docs/adding_a_method.md runs, and does what the page says."""

from __future__ import annotations

import re
import sys
import types
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import tiny
import torch
from photo_batches import photo_batch

from distunlearn.config.recipes import digits
from distunlearn.data.schedule import Batch
from distunlearn.encoders.model import build_model
from distunlearn.objectives import make_objective
from distunlearn.objectives.forward import Context, embed
from distunlearn.verify.ledger import read_ledger

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding_a_method.md"


def test_example_lowers_the_agreement_of_forgotten_views(monkeypatch) -> None:
    module = types.ModuleType("dissolve")
    monkeypatch.setitem(sys.modules, "dissolve", module)
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(code, "dissolve.py", "exec"), module.__dict__)
    base = digits()
    cfg = replace(base, unlearn=replace(base.unlearn, retain_batch=8, forget_batch=4), method=module.DissolveConfig())
    method = module.Dissolve(cfg)
    assert dict(method.batch_sizes()) == {"retain": 8, "forget": 4} and method.forgets

    model = build_model(cfg, None)
    objective = make_objective(cfg.objective)
    ctx = Context(cfg=cfg, objective=objective, model=model, forward=model, device=torch.device("cpu"))
    batches = {name: batch(name, count) for name, count in (("retain", 8), ("forget", 4))}
    out = method.loss(ctx, batches)
    assert out.consumed == {"retain": batches["retain"].ids, "forget": batches["forget"].ids}
    assert ctx.images == 2 * (8 + 4)

    def agreement() -> torch.Tensor:
        u = torch.nn.functional.normalize(embed(ctx, batches["forget"], batchnorm="eval").output, dim=-1)
        return (u[0] * u[1]).sum(-1).mean()

    before = agreement()
    assert float(out.loss.detach()) == np.float32(out.metrics["task_loss"] + out.metrics["agreement"])
    assert abs(out.metrics["agreement"] - float(before.detach())) < 1e-5
    (before * 10).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    assert float(agreement().detach()) < float(before.detach())


def test_example_runs_by_the_name_of_its_file(tmp_path) -> None:
    """Trained, forgotten, audited and reported from outside the package; its key is known, that of another is not."""
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    file, out = tmp_path / "dissolve.py", tmp_path / "run"
    file.write_text(code)
    done = tiny.run(out, f"method.name={file}:Dissolve", "method.agreement_weight=2", "audit.tier=0")
    assert done.returncode in (0, 6, 7), done.stderr[-3000:]
    [line] = [line for line in read_ledger(out / "ledger.jsonl") if line["event"] == "code"]
    assert line["outside"] == [{"name": str(file), "file": str(file), "sha256": sha256(code.encode()).hexdigest()}]
    assert "making the views of each forgotten image disagree" in (out / "report.html").read_text()
    refused = tiny.run(tmp_path / "other", f"method.name={file}:Dissolve", "method.ascent_weight=2")
    assert refused.returncode == 2 and "did you mean method.agreement_weight?" in refused.stderr
    file.write_text(code + "\n# another version\n")
    changed = tiny.run(out, f"method.name={file}:Dissolve", "method.agreement_weight=2", "unlearn.steps=7")
    assert changed.returncode == 2 and "other settings" in changed.stderr
    (out / "done.json").unlink()
    changed = tiny.run(out, f"method.name={file}:Dissolve", "method.agreement_weight=2", "audit.tier=0")
    assert changed.returncode == 2 and "this run began under" in changed.stderr


def batch(name: str, count: int) -> Batch:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 1, 32, 32), dtype=torch.uint8, generator=generator)
    ids = [f"{name}-{i}" for i in range(count)]
    return photo_batch(ids=ids, photos=images, epochs=np.zeros(count, dtype=np.int64), labels=torch.full((count,), -1))
