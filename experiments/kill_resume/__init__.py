"""Does a run that is killed again and again end where the undisturbed one ends?"""
