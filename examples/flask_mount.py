"""labs in a Flask app, on one engine: /llm/ is the chat page and the API, /ask a route of Flask."""

import flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import labs
from labs_api import create_app
from labs_engine import Busy, Cached, Engine
from labs_models import One
from labs_serve import make_server

config = labs.load_config()
engine = Cached(Engine(labs.load_model(config), config.server), config.response_cache)
site = flask.Flask(__name__)
site.register_error_handler(labs.InputError, lambda error: (str(error), 400))
site.register_error_handler(Busy, lambda error: (str(error), 503, {"Retry-After": "1"}))
app = DispatcherMiddleware(site, {"/llm": create_app(config, One(engine, config.model_id))})


@site.get("/ask")
def ask() -> flask.Response:
    inputs = labs.build_inputs(engine.model, prompt=flask.request.args["question"])
    *pieces, done = engine.submit(inputs, config.generation)
    if isinstance(done, labs.Failed):
        raise done.error
    return flask.Response([getattr(each, "text", "") for each in pieces], mimetype="text/plain")


if __name__ == "__main__":
    make_server(app, config).run()  # any threaded WSGI server works too
    engine.close()
