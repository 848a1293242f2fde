"""The check of versions: what it installs, reads and writes; nothing is installed."""

import json
from pathlib import Path

import check_compatibility
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ('torch', 'family', 'expected'),
    [
        ('2.6', 'OpenMMLab', {'torch==2.6.*', 'mmengine==0.10.7', 'mmcv-lite==2.1.0'}),
        ('latest', 'OneDL', {'torch', 'onedl-mmengine==0.10.12', 'onedl-mmcv==2.3.6'}),
    ],
)
def test_a_cell_has_the_pinned_engine_and_no_toolbox(torch, family, expected):
    wanted = check_compatibility.packages(torch, family)
    assert expected <= {*wanted}
    assert not any(name in word for word in wanted for name in ('mmdet', 'mmseg', 'mmpretrain'))


def test_the_outcomes_of_tests_are_counted(tmp_path):
    report = tmp_path / 'report.xml'
    report.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped/></testcase>'
        '<testcase name="c"><failure message="1 != 2"/></testcase></testsuite></testsuites>'
    )
    found = check_compatibility.counts(report)
    assert found == dict(passed=1, failed=1, skipped=1, failures=['c: 1 != 2'])


def test_the_page_has_the_tables_of_what_was_found():
    lines = (ROOT / 'docs/compatibility.jsonl').read_text().splitlines()
    tables = check_compatibility.tables([json.loads(line) for line in lines])
    assert f'\n{tables}\n' in (ROOT / 'docs/compatibility.md').read_text()
    assert tables.count('not run') == 24 - len(lines)
