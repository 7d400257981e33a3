"""Known cases: does a search still find the cause that is known from elsewhere?"""
