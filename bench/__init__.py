"""What stands behind benchmark.sh and report.py: statistics, and the tables of the control suites."""
