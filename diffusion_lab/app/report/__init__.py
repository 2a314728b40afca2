"""report.html: what a run was, what it made and how good it is, in one file that needs nothing else."""

from diffusion_lab.app.report.build import write_report

__all__ = ["write_report"]
