"""What a finished run shows, checked without torch and without anything else of the package.

The same files are the package `distunlearn_verify` of a wheel of their own (`pyproject.toml` beside this file), for
people who check and do not train: they import each other by relative names alone.

| module | what it holds |
|---|---|
| `errors` | the errors of the whole package, for nothing stands below this room |
| `statistics`, `gates`, `figures` | AUC, paired bootstrap, verdicts: the one implementation, the audit's too |
| `scores` | raw scores read back, and the figures computed again from them |
| `ledger` | the record of what was consumed, read strictly; coverage |
| `states` | digest of an encoder's weights; the exported encoder is the audited one |
| `merkle` | trees of RFC 9162 |
| `run` | a run directory as a whole: its files agree with each other |
| `dose` | the dose chosen again from the scores that it was chosen by |
| `secret` | the run secret, and salted commitments of files that name images |
| `keys`, `envelope` | Ed25519 keys, the trust file; signed statements, read strictly |
| `forms` | what statements are made of |
| `commitment`, `countersign` | what is declared before the run, and the officer's part; the register of tries |
| `receipt`, `disposal`, `revocation` | for one person; what was deleted; what is no longer to be relied on |
| `certificate`, `check`, `cli` | what a certificate states; `verify`, level by level; its command |
"""
