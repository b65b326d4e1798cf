//! Everything that a server can say and that is not so: to every question of a client, every lie.
//!
//! [`Route`] has the routes that a server has, and which of them clients ask. [`Lie`] has the kinds of lies, and
//! to which routes each can be told; `tell` turns honest answers into lies; [`mouth`] is a server that tells
//! of all that can be told to a question the one that was told least often.

mod mouth;
mod tell;

pub use mouth::{Told, mouth};

/// A route of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "named as what they give")]
pub enum Route {
    Requests,
    Outcome,
    List,
    Bulk,
    Record,
    History,
    Watch,
    Servers,
    Administrators,
    Decisions,
    Space,
    Completion,
    Secrets,
    Secret,
    Shares,
    Membership,
    Status,
    /// For people, load balancers, collectors: no client believes anything of it.
    Unasked,
}

/// All routes: method, path as the server's description has it.
pub const ROUTES: &[(&str, &str, Route)] = &[
    ("post", "/v1/requests", Route::Requests),
    ("get", "/v1/requests/{client}/{sequence}", Route::Outcome),
    ("get", "/v1/records", Route::List),
    ("post", "/v1/records/lookup", Route::Bulk),
    ("get", "/v1/records/{name}", Route::Record),
    ("get", "/v1/records/{name}/history", Route::History),
    ("get", "/v1/records/{name}/watch", Route::Watch),
    ("get", "/v1/servers", Route::Servers),
    ("get", "/v1/administrators", Route::Administrators),
    ("get", "/v1/decisions", Route::Decisions),
    ("get", "/v1/space/{key}", Route::Space),
    ("get", "/v1/completion", Route::Completion),
    ("get", "/v1/secrets", Route::Secrets),
    ("get", "/v1/secrets/{name}", Route::Secret),
    ("post", "/v1/shares", Route::Shares),
    ("get", "/v1/membership", Route::Membership),
    ("get", "/v1/status", Route::Status),
    ("get", "/v1/manifest", Route::Unasked),
    ("get", "/v1/openapi.json", Route::Unasked),
    ("get", "/healthz", Route::Unasked),
    ("get", "/readyz", Route::Unasked),
    ("get", "/metrics", Route::Unasked),
];

impl Route {
    /// Of a question.
    pub fn of(method: &str, path: &str) -> Option<Self> {
        let parts: Vec<_> = path.split(['?']).next()?.split('/').collect();
        let fits = |template: &str| {
            let template: Vec<_> = template.split('/').collect();
            template.len() == parts.len()
                && template.iter().zip(&parts).all(|(is, part)| is.starts_with('{') || is == part)
        };
        let found =
            |(of, template, _): &&(&str, &str, Route)| method.eq_ignore_ascii_case(of) && fits(template);
        // What has no parameter comes first: `lookup` is no name there, since it is a POST.
        ROUTES.iter().find(found).map(|(.., route)| *route)
    }
    fn is_certified(self) -> bool {
        !matches!(self, Self::Completion | Self::Shares | Self::Membership | Self::Status | Self::Unasked)
    }
    fn has_path(self) -> bool {
        use Route::{Bulk, History, Outcome, Record, Requests, Secret, Space, Watch};
        matches!(self, Requests | Outcome | Bulk | Record | History | Watch | Secret | Space)
    }
    fn has_page(self) -> bool {
        use Route::{Administrators, Decisions, History, List, Secrets, Servers};
        matches!(self, List | Secrets | History | Servers | Administrators | Decisions)
    }
}

macro_rules! lies {
    ($route:ident; $($(#[$doc:meta])* $lie:ident: $can:expr;)*) => {
        /// A kind of lie.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Lie { $($(#[$doc])* $lie,)* }
        impl Lie {
            /// All kinds.
            pub const ALL: &[Self] = &[$(Self::$lie,)*];
            /// Whether it can be told on a route.
            pub fn can_be_told(self, $route: Route) -> bool {
                $route != Route::Unasked && match self { $(Self::$lie => $can,)* }
            }
        }
    };
}

lies! {
    route;
    // About who signed.
    /// One vote fewer than q.
    FewVotes: route.is_certified();
    /// One signer twice.
    RepeatedVote: route.is_certified();
    /// A signer who is not in the manifest.
    ForeignVote: route.is_certified();
    /// More votes than q.
    SurplusVote: route.is_certified();
    /// More keys than votes.
    SurplusKey: route.is_certified();
    /// A key that no identity certified.
    UncertifiedKey: route.is_certified();
    /// Another root than was signed.
    ForgedRoot: route.is_certified();
    /// A later time and number than were signed.
    MadeYounger: route.is_certified();
    /// The same question's answer of another cluster.
    OtherCluster: matches!(route, Route::List | Route::Bulk | Route::Record | Route::History
        | Route::Servers | Route::Administrators | Route::Decisions | Route::Secrets | Route::Secret
        | Route::Space | Route::Completion | Route::Watch);
    /// What was true a while ago.
    Stale: !matches!(route, Route::Membership | Route::Status | Route::Requests | Route::Shares);

    // About what the state has.
    /// Another step on the way.
    WrongPath: route.has_path();
    /// No way at all.
    CutPath: route.has_path();
    /// The right way to another leaf.
    WrongLeaf: route.has_path();
    /// Nothing where there is something.
    AbsentForPresent: route.has_path();
    /// Something where there is nothing.
    PresentForAbsent: matches!(route, Route::Bulk | Route::Record | Route::Secret | Route::Outcome);
    /// Something else than is there.
    ChangedValue: route.has_path();
    /// The true answer to the same question about something else.
    OtherName: matches!(route, Route::Bulk | Route::Record | Route::History | Route::Secret
        | Route::Space | Route::Outcome | Route::Watch);

    // About what lies beside one another.
    /// An entry less.
    EntryLeftOut: route.has_page() && route != Route::Decisions;
    /// An entry as if it lay outside.
    NeighbourForEntry: route.has_page() && route != Route::Decisions;
    /// Nothing at all.
    EmptyPage: route.has_page();
    /// Nothing that can be seen.
    Pruned: route.has_page();
    /// A true proof of a part without entries, that goes on where it was to begin.
    EmptyThatGoesOn: matches!(route, Route::List | Route::Secrets);
    /// A true proof of the first entry alone.
    StopsEarly: matches!(route, Route::List | Route::Secrets);
    /// A true proof of another page.
    OtherPage: matches!(route, Route::List | Route::Secrets | Route::History);
    /// Inner nodes within each other without end.
    Nesting: route.has_page();

    // About numbers and statements.
    /// A version that nobody wrote.
    HigherVersion: route == Route::Bulk;
    /// A version that is over.
    LowerVersion: route == Route::Bulk;
    /// Fewer answers than questions.
    FewerAnswers: route == Route::Bulk;
    /// No certificate.
    NoCertificate: route == Route::Bulk;
    /// More is complete than is.
    ClaimsMore: matches!(route, Route::Completion | Route::Requests);
    /// By fewer servers than that takes.
    FewHold: matches!(route, Route::Completion | Route::Requests);
    /// By one server twice.
    HoldsTwice: matches!(route, Route::Completion | Route::Requests);
    /// With keys of nobody.
    SurplusHeldKey: matches!(route, Route::Completion | Route::Requests);
    /// The true answer to an earlier question.
    Earlier: matches!(route, Route::Requests | Route::Shares);
    /// Refused instead of done, or the other way round.
    OtherOutcome: matches!(route, Route::Requests | Route::Outcome);
    /// Changes of the membership that do not come.
    NoChanges: route == Route::Membership;
    /// Changes that are none.
    FalseChanges: route == Route::Membership;
    /// Another time.
    OddClock: route == Route::Status;

    // About shares.
    /// Another share, sealed as it should be.
    WrongShare: route == Route::Shares;
    /// A share of zeros.
    ZeroShare: route == Route::Shares;
    /// A share that does not open.
    BrokenSeal: route == Route::Shares;
    /// Another server's share as one's own.
    SwappedShare: route == Route::Shares;
    /// Another server's whole answer.
    OthersShare: route == Route::Shares;
    /// A share of another release.
    OtherRelease: route == Route::Shares;
    /// A share of another secret.
    OtherIndex: route == Route::Shares;
    /// No share.
    NoShare: route == Route::Shares;
    /// Another ciphertext.
    WrongCiphertext: route == Route::Shares;
    /// No ciphertext.
    NoCiphertext: route == Route::Shares;

    // No answer at all.
    /// Not found, without a proof.
    NotFound: true;
    /// Another change came first, without a proof.
    Conflict: true;
    /// The epoch has passed, without a proof.
    EpochPassed: true;
    /// Not allowed.
    NotAllowed: true;
    /// The request is malformed.
    Malformed: true;
    /// It expired.
    Expired: true;
    /// Too large.
    TooLarge: true;
    /// Too many requests: in half a minute again.
    TooMany: true;
    /// Not ready.
    NotReady: true;
    /// An internal error.
    Internal: true;
    /// A kind of error that there is not.
    NoSuchProblem: true;
    /// A page for people.
    Page: true;
    /// JSON of something else.
    OtherJson: true;
    /// Nested brackets.
    DeepJson: true;
    /// Bytes.
    Garbage: true;
    /// No bytes.
    Nothing: true;
    /// More bytes than any answer has.
    Huge: true;
    /// The connection breaks.
    Dropped: true;
    /// It breaks after a while.
    Slow: true;

    // In a stream.
    /// The same event without end.
    Flood: route == Route::Watch;
    /// Empty lines without end.
    EmptyLines: route == Route::Watch;
}

impl Lie {
    /// Whether it costs seconds, or many bytes: it is told less often.
    pub fn is_costly(self) -> bool {
        matches!(
            self,
            Self::Slow | Self::Huge | Self::Flood | Self::EmptyLines | Self::TooMany | Self::NotReady
        )
    }
}
