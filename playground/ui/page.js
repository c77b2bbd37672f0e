// What belongs to the page as a whole: one script, run once when it opens.
() => {
  const visible = (id) => {
    const found = document.getElementById(id);
    return found?.offsetParent ? found : null;
  };

  // `navigator.clipboard` is missing on plain http.
  window.copyText = (text) => {
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    const box = document.createElement("textarea");
    box.value = text;
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  };

  window.copyLink = async (query, id) => {
    // on a busy machine the answer may reach the page after the event that announces it
    for (let look = 0; !query && look < 20; look++) {
      await new Promise((later) => setTimeout(later, 50));
      query = document.querySelector(`#${id}-text textarea`)?.value || "";
    }
    if (!query) return;
    window.copyText(new URL(`?${query}`, location.href.split("?")[0]).href);
    const button = document.getElementById(id), before = button.textContent;
    button.textContent = "Link copied";
    setTimeout(() => { button.textContent = before; }, 1500);
  };

  // Badges open a box below them; it closes by Escape, by a click outside and when focus leaves by Tab.
  const openBadges = () => [...document.querySelectorAll(".badge > .label-wrap.open")];
  const closeBadges = (except) => openBadges().forEach((head) => head.parentElement.contains(except) || head.click());
  document.addEventListener("pointerdown", (event) => closeBadges(event.target));
  document.addEventListener("focusin", (event) => closeBadges(event.target));

  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.closest("#prompt")) {
      (visible("run") || visible("run-compare"))?.click();
    }
    if (event.key === "Escape" && event.isTrusted) {
      const badge = openBadges()[0];
      if (badge) {
        badge.click();
        badge.focus();
      } else if (document.body.dataset.token) {
        document.dispatchEvent(new CustomEvent("token-closed"));
      }
    }
  });

  window.showTab = (name) => {
    const before = document.body.dataset.tab ?? "generate";
    document.body.dataset.tab = name;
    for (const wait of [0, 300, 1000]) setTimeout(window.views.rest, wait); // its parts come when it is opened first
    if (name === before) return; // gradio selects the first tab once more when the page has come up
    document.dispatchEvent(new CustomEvent("token-closed", { detail: { elsewhere: true } }));
  };

  // Clicking beside the text and the inspector closes what is open. Where a click began counts: a menu's choice is gone
  // before it ends.
  const KEPT = ".tv-text, #inspector, #settings, #panel, .mh-card, [role=listbox]";
  let kept = false;
  document.addEventListener("pointerdown", (event) => { kept = Boolean(event.target.closest(KEPT)); });
  document.addEventListener("click", (event) => {
    if (!document.body.dataset.token || kept || event.target.closest(KEPT)) return;
    document.dispatchEvent(new CustomEvent("token-closed", { detail: { elsewhere: true } }));
  });

  // What was said of the last action goes with the next one.
  document.addEventListener("click", (event) => {
    if (!event.target.closest("button") || event.target.closest(".toast-wrap")) return;
    document.querySelectorAll(".toast-wrap .toast-close").forEach((close) => close.click());
  });

  // gradio's menus stay open when focus leaves by Tab, but not after Escape
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Tab" || event.target.getAttribute("role") !== "combobox") return;
    event.target.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
  });

  // A link says which tab it means.
  const query = new URLSearchParams(location.search), wanted = CSS.escape(query.get("experiment") || "");
  document.querySelector(`[role=tab][data-tab-id="${CSS.escape(query.get("tab") || "")}"]`)?.click();
  if (wanted) setTimeout(() => document.getElementById(`experiment-${wanted}`)?.scrollIntoView({ block: "nearest" }), 500);

  // A server that is gone is announced, and so is its return.
  const banner = document.createElement("p");
  banner.id = "connection";
  banner.setAttribute("role", "alert");
  banner.hidden = true;
  document.body.append(banner);
  let lost = sessionStorage.lost === "yes"; // gradio loads the page anew once the server answers again
  const tell = (text, for_ms) => {
    banner.textContent = text;
    banner.hidden = false;
    if (for_ms) setTimeout(() => { banner.hidden = true; }, for_ms);
  };
  const look = async () => {
    if (document.hidden && !lost) return;
    try {
      await fetch("gradio_api/startup-events", { cache: "no-store", signal: AbortSignal.timeout(5000) });
      if (lost) {
        document.body.removeAttribute("data-writing"); // what was under way has ended with the server
        tell("Connected again. What was being written has stopped; press Run to write anew.", 6000);
      }
      sessionStorage.lost = lost = "";
    } catch {
      if (!lost) tell("The connection to the server is lost; trying again…");
      sessionStorage.lost = lost = "yes";
    }
  };
  if (lost) look();
  setInterval(look, 4000);
}
