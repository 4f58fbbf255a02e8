"""What stands behind benchmark.sh: methods, suites, runs, the search, statistics, tables and figures."""
