"""Follow jobs to their end: show the ranks' output, and find out why a job ended."""
