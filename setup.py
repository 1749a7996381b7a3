"""Packaging: version, ranges of requirements and the console script stand in settings.ini, which nbdev reads too."""
from configparser import ConfigParser
from setuptools import setup

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

setup(
    version=cfg["version"],
    python_requires=">=3.11,<3.13",
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
