"""The images of our own guests are what their sources make."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lguest_mp import demo

CHECKOUT = Path(__file__).resolve().parents[2]
GUESTS = Path(__file__).with_name("guests")
RECORD = json.loads((GUESTS / "images.json").read_text())
IMAGES: dict[str, dict[str, str]] = RECORD["images"]


def test_every_image_is_on_record() -> None:
    images = [*GUESTS.glob("*.elf"), demo.kernel()]
    assert sorted(IMAGES) == sorted(str(image.relative_to(CHECKOUT)) for image in images)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_the_one_that_was_built(name: str) -> None:
    assert hashlib.sha256((CHECKOUT / name).read_bytes()).hexdigest() == IMAGES[name]["image"]


def test_images_were_built_from_these_sources() -> None:
    subprocess.run([sys.executable, CHECKOUT / "tools" / "build-guests", "--check-sources"], check=True)


def test_images_are_what_the_assembler_makes_of_the_sources() -> None:
    if not all(map(shutil.which, ("as", "ld", "objcopy", "nm"))):
        pytest.skip("there are no binutils")
    version = subprocess.check_output(["as", "--version"], text=True).splitlines()[0]
    if version != RECORD["assembler"]:
        pytest.skip(f"this is {version}, and they were built with {RECORD['assembler']}")
    subprocess.run([sys.executable, CHECKOUT / "tools" / "build-guests", "--check"], check=True)


def test_the_demo_is_installed_with_its_sources() -> None:
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["lguest_mp.demo"]
    folder = demo.kernel().parent
    installed = {path.name for pattern in patterns for path in folder.glob(pattern)}
    assert installed == {"demo.elf", "demo.s", "devices.s", "guest.ld", "runtime.s"}
