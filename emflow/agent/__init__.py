"""The agent: from results to decisions to commands, in a log from which every decision can be made again."""
