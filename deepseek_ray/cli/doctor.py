"""`deepseek-ray doctor`: what this machine has, and what is missing."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from deepseek_ray.cli.machine import Finding, examine

_MARKS = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "missing": "[red]missing[/red]"}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Show cores, instruction sets, memory, GPUs and versions, and say what is missing and how to get it.

    Exits with 1 when something is missing that the product cannot do without.

    [bold]Examples[/bold]

      deepseek-ray doctor\n
      deepseek-ray doctor --json | jq '.[] | select(.status != "ok")'
    """
    findings = examine()
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        _print_table(findings)
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        remedy = f"\n{escape(finding.remedy)}" if finding.remedy else ""
        table.add_row(_MARKS[finding.status], finding.name, escape(finding.value) + remedy)
    Console().print(table)
