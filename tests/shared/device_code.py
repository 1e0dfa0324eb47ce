"""What device code and the text around it say of a kernel's configuration."""

from __future__ import annotations

import re
from pathlib import Path

import jax_deepgemm

INCLUDE = Path(jax_deepgemm.__file__).parent / "include" / "jax_deepgemm"


def fields_of_concept(header: str, concept: str) -> dict[str, str]:
    """Name -> explanation of every field that a configuration must have: `C::NAME;  // words`, any letter."""
    [body] = re.findall(
        rf"^concept {concept} = requires {{\n(.*?)^}};", (INCLUDE / header).read_text(), re.M | re.S
    )
    required = re.findall(r"[A-Z]::(\w+);", body)
    documented = re.findall(r"^ +(?:typename )?[A-Z]::(\w+); +// (.+)$", body, re.M)
    assert required == [name for name, _ in documented], "a field without its line"
    return dict(documented)


def fields_of_struct(text: str, name: str) -> list[str]:
    """The names that a struct of a kernel's text gives, in order of the alphabet."""
    [body] = re.findall(rf"^struct {name}(?: : \w+)? {{\n(.*?)^}};", text, re.M | re.S)
    return sorted(re.findall(r"(?:using |, | )(\w+) =", body))
