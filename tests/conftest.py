import os
from pathlib import Path

import pytest

# Tests never reach for a hub, and tiny models run best on one thread.
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('OMP_NUM_THREADS', '1')

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def shared_data() -> Path:
    """Real CIFAR-10 and photographs beside the repository; tests that need them skip where they are absent."""
    folder = ROOT.parent / 'shared' / 'data'
    if not folder.is_dir():
        pytest.skip(f'no real images at {folder}')
    return folder
