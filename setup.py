# Only for tools that know neither PEP 517 nor PEP 660; all metadata is in setup.cfg.
from setuptools import setup

setup()
