"""Membership inference before, after and on the retrained encoder; utility; gates; raw scores.

| room | what it holds |
|---|---|
| `signals` | one pass of every audited image through one encoder |
| `attacks` | one attack a file |
| `figures` | gates, utility, similarity, two-sample tests, distances to the retrained encoder |
| `trainings` | pooled shadow encoders, stress tests |
| `statistics` | AUC, paired bootstrap, TPR at a low FPR, KS |
| `relearn` | how fast forgotten images come back |
| `summary` | all of it, as audit/summary.json and raw scores |
| `run_audit` | the audit of a run directory, by tier |
"""
