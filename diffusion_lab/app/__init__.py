"""The application: compose -> check -> build -> run.

    cli.py, session.py                 a command line, from its words to its exit code
    config/                            what is typed: completed, composed, checked, told in one line where it is wrong
    build.py, assemble.py              objects of a config: one, and all of a training run
    teacher.py, stored.py              networks of other runs: of a student, inside a guidance
    train.py, sample.py, evaluate.py   the three jobs; launch.py and rank.py where several processes do one
    runs/                              the run folder, its record, its weights
    sampling/, scoring/                what is sampled and how; what it is worth
    sweep/, report/, export/           many jobs; the pages; weights to give away
    latents.py                         the command lines of the latents stage

`cli.py`, and what it imports at its top, knows neither torch nor lightning, so that help, completion and error messages
come at once.
"""
