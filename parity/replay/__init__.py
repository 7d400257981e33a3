"""Known cases, replayed: does the tool still find the cause that people found by hand?"""
