// Lets a product's page post its own exposures, thumbs, reactions and comments.
//
//   const feedback = AlignFeedback({ endpoint: "https://feedback.example", token: "..." });
//   feedback.shown({ prompt, response });        // when the answer and its buttons are on the screen
//   feedback.thumb(true);                        // or feedback.send({ thumb: false, reactions: ["sad"], comment: "..." })
//   feedback.thumb(true);                        // pressed again: taken back, as feedback.retract("thumb") does
//
// `token` is what the product's own server minted for this user and this answer (align.feedback.server.tokens), or
// a function that returns one, or a promise of one. A token is good for one exposure and one answer; with a function, a
// user who changes their mind is given a new token, and the newer answer counts. thumb and react take back what was
// stored since the page was loaded; retract takes back what was said before.
"use strict";

(function () {
  function AlignFeedback({ endpoint, token }) {
    let first = null, item = null, shownAt = null, told = false, up = null;
    const reactions = new Set();
    const mint = () => Promise.resolve(typeof token === "function" ? token() : token);
    const current = () => (first = first || mint());

    function post(path, body) {
      // text/plain needs no preflight; the server reads JSON whatever the type says. No cookie travels.
      return fetch(endpoint.replace(/\/$/, "") + path, {
        method: "POST", body: JSON.stringify(body), headers: { "content-type": "text/plain" },
        credentials: "omit", keepalive: true, referrerPolicy: "origin",
      }).then(async (response) => {
        const found = await response.json().catch(() => ({}));
        if (!response.ok) throw new Error(found.error || "feedback was refused: " + response.status);
        return found;
      });
    }

    function keep(answer) {
      if (typeof answer.thumb === "boolean") up = answer.thumb;
      for (const name of answer.reactions || []) reactions.add(name);
      for (const name of answer.retract || []) {
        if (name === "thumb") up = null;
        else reactions.delete(name);
      }
    }

    return {
      shown(content) {
        item = content || null;
        shownAt = performance.now();
        return current().then((value) => post("/exposure", { token: value, item }));
      },
      send(answer) {
        const latency = shownAt === null ? null : Math.round(performance.now() - shownAt);
        const fresh = told ? mint() : current();
        told = true;
        return fresh
          .then((value) => post("/feedback", Object.assign({ token: value, item, latency_ms: latency }, answer)))
          .then((found) => { keep(answer); return found; });
      },
      thumb(value) { return up === Boolean(value) ? this.retract("thumb") : this.send({ thumb: Boolean(value) }); },
      react(name) { return reactions.has(name) ? this.retract(name) : this.send({ reactions: [name] }); },
      retract(...names) { return this.send({ retract: names }); },
      comment(text) { return this.send({ comment: text }); },
    };
  }
  window.AlignFeedback = AlignFeedback;
})();
