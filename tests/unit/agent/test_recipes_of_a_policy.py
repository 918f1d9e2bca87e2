"""An experiment begins only where the recipes make what its policy reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from emflow.agent.opening import make_policy, reductions_for, share_of
from emflow.config import load
from emflow.errors import ConfigError

CHEAP = 'name = "cheap"\n[[reduction]]\nuse = "pattern"\nname = "pattern"\n'


@pytest.mark.parametrize(("degraded", "refused"), [("", False), ('degraded = "quick"', False), ("./cheap.toml", True)])
def test_the_recipe_near_a_cap_makes_it_too(tmp_path: Path, degraded: str, refused: bool) -> None:
    (tmp_path / "cheap.toml").write_text(CHEAP)
    line = f'degraded = "{degraded}"' if refused else degraded
    (tmp_path / "emflow.toml").write_text(f'[[watch]]\nroot = "share"\nrecipe = "quick"\n[caps]\n{line}\n')
    config = load(tmp_path / "emflow.toml")
    policy, _ = make_policy("threshold", {})
    if not refused:
        assert reductions_for(config, policy, "threshold", share_of(config))
        return
    with pytest.raises(ConfigError, match="'cheap'"):
        reductions_for(config, policy, "threshold", share_of(config))
