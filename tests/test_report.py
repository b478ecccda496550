"""The table and picture of finished runs, and the quickstart that ends in them."""
import csv
import json
import os
import subprocess

from conftest import ROOT, run_script
from PIL import Image


def test_the_quickstart_ends_in_a_table_a_csv_file_and_a_picture(tmp_path):
    """The launcher itself, from another folder, with few updates; a second call only reports."""
    command = ['bash', ROOT / 'launch/quickstart.sh', '--epochs', '2', '--train-steps-per-epoch', '3',
               '--calmix-warmup-epochs', '1', '--workers', '0']
    environment = dict(os.environ, OUTPUT=str(tmp_path / 'a folder'))
    tables = []
    for _ in range(2):
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        tables.append(result.stdout)
    assert tables[0] == tables[1] and 'is finished' in result.stderr
    folder = tmp_path / 'a folder'
    with open(folder / 'comparison.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['run'] for row in rows] == ['fixmatch', 'fixmatch+calibratemix']
    assert list(rows[0]) == ['run', 'error', 'ece', 'nll', 'confidence']
    for row in rows:
        metrics = json.loads((folder / row['run'] / 'last/metrics.json').read_text())
        assert {key: f'{metrics[key]:.4f}' for key in ('error', 'ece', 'nll', 'confidence')}.items() <= row.items()
        assert f'{metrics["ece"]:.2f}' in tables[0]
    with Image.open(folder / 'reliability.png') as picture:
        assert picture.width > picture.height > 300


def test_a_folder_without_a_run_is_named_in_one_line(tmp_path):
    result = run_script('report.py', tmp_path, '--output', tmp_path / 'out')
    assert result.returncode == 2 and result.stdout == ''
    assert result.stderr.startswith(f'report.py: error: {tmp_path}: no run') and len(result.stderr.splitlines()) == 1
