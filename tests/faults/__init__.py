"""Faults injected into real processes (`make faults`): kills, damage, full disks; see docs/reliability.md."""
