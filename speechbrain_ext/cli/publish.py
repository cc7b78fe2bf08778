"""``publish``: a model folder to Hugging Face."""

from speechbrain_ext.cli._common import add_trust, say, usage


def add(commands):
    """Add the command."""
    parser = commands.add_parser(
        "publish", help="upload a trained model to Hugging Face", description="Upload a trained model; prints its URL."
    )
    parser.add_argument("--model", metavar="MODEL", required=True, help="a model folder that training wrote")
    add_trust(parser)
    parser.add_argument("repo_id", metavar="REPO_ID", help="the repository, user/model; created if it is missing")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="a branch, created if it is missing; by default main")
    parser.add_argument("--message", metavar="TEXT", help="the commit message")
    licence = "for the model card, such as cc-by-4.0; by default that of the corpus, if it states one"
    parser.add_argument("--license", metavar="NAME", help=licence)
    parser.set_defaults(run=run)


def run(arguments):
    """Upload a model folder as one commit, and print the URL of that commit."""
    with usage():
        from speechbrain_ext.inference.publish import PublishError, publish

        options = {key: getattr(arguments, key) for key in ("private", "revision", "message", "license", "trust")}
        try:
            url = publish(arguments.model, arguments.repo_id, **options)
        except PublishError as error:
            say(error)
            return 1
    print(url)
    return 0
