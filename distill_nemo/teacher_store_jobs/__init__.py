"""The job that runs a teacher alone and writes a store of its targets, and the verification of a store."""
