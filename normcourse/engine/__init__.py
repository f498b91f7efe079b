"""What no lesson shows: a whole run, records, data sources, several processes, the command line."""
