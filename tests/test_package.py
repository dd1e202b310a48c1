"""What a wheel would hold."""

from pathlib import Path

import zotune

ROOT = Path(zotune.__file__).parent


def test_every_room_is_a_package():
    """Without an `__init__.py` a folder can be imported from a checkout, and is missing from the wheel."""
    rooms = {path.parent for path in ROOT.rglob("*.py")}
    assert len(rooms) > 10
    assert [str(room.relative_to(ROOT)) for room in rooms if not (room / "__init__.py").exists()] == []
