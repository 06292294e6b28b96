from visiontuner.cli.console import make_console, print_checks
from visiontuner.workflow.doctor import Check


def test_a_table_in_a_pipe_keeps_long_lines_whole(capsys):
    detail = "one two three " * 20
    advice = "Do this and that. " * 10
    print_checks(make_console(), [Check(name="x", status="error", detail=detail, advice=advice)])
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["error", "x", *detail.split()]
    assert second.split() == advice.split()
