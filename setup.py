"""Compute the packages; everything else about the distribution stands in setup.cfg.

The top-level folders ``supervisor`` and ``workers`` are installed below the namespace ``speedlayer``, since both short
names are taken by other distributions. The packages are found, not listed: a subpackage that a list forgets would be
missing from the wheel without an error.
"""

from setuptools import find_packages, setup

FOLDERS = ("supervisor", "workers")

packages = [
    package
    for folder in FOLDERS
    for package in [f"speedlayer.{folder}", *(f"speedlayer.{folder}.{name}" for name in find_packages(folder))]
]

setup(
    packages=packages,
    package_dir={f"speedlayer.{folder}": folder for folder in FOLDERS},
    package_data={package: ["py.typed", "*.sql", "*.toml", "*.html", "*.css", "*.js", "*.svg"] for package in packages},
)
